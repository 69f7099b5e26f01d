"""A short run in place of a formula: two sizes, a straight line through them, and a look along it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from metier.core.evidence import Value
from metier.planning.plans import Plan, fits_in


class Sample(NamedTuple):
    """What one forward, backward and step took.

    Attributes:
        tokens: Tokens of the micro-batch, padding included.
        peak_bytes: Highest memory in use.
        seconds: Wall time.
        parts: Micro-batches of that size in the step.
    """

    tokens: int
    peak_bytes: int
    seconds: float
    parts: int = 1


class Probe(Value):
    """What was measured, as lines over the tokens of a micro-batch."""

    base_bytes: float
    """Memory that does not depend on the tokens."""
    bytes_per_token: float
    """Memory for each token of the micro-batch."""
    base_seconds: float
    """Time of a step that does not depend on the tokens."""
    seconds_per_token: float
    """Time for each token."""
    samples: tuple[Sample, ...]
    """What was run."""

    def peak_bytes(self, tokens: int) -> int:
        """Peak memory at a micro-batch of `tokens`."""
        return round(self.base_bytes + self.bytes_per_token * tokens)

    def seconds(self, tokens: float, *, steps: int = 1) -> float:
        """Wall time of `steps` steps that read `tokens` in all."""
        return self.base_seconds * steps + self.seconds_per_token * tokens


def probe(measure: Callable[[int], Sample], *, small: int, large: int) -> Probe:
    """Run two sizes and fit memory and time.

    The small size is run twice and its first run is thrown away: it makes the optimizer's states and warms caches.

    Args:
        measure: Runs one forward, backward and optimizer step of about so many tokens and says what it took, and how
            many tokens they really were.
        small: Tokens of the smaller run.
        large: Tokens of the larger run. Where both runs turn out equally large (rows cannot be cut), memory is taken
            as it is and time as proportional to the tokens.
    """
    measure(small)
    samples = (measure(small), measure(large))
    first, second = samples
    base_bytes, slope_bytes = _line(
        first.tokens, first.peak_bytes, second.tokens, second.peak_bytes, through_zero=False
    )
    base_seconds, slope_seconds = _line(
        first.tokens * first.parts, first.seconds, second.tokens * second.parts, second.seconds, through_zero=True
    )
    return Probe(
        base_bytes=base_bytes,
        bytes_per_token=slope_bytes,
        base_seconds=base_seconds,
        seconds_per_token=slope_seconds,
        samples=samples,
    )


def confirm(plan: Plan, kind: str, measured: Probe) -> Plan:
    """The plan with one method's peak and time as measured; its verdict follows.

    Args:
        plan: What the formulas said.
        kind: Which method was run: "full", "lora" or "freeze".
        measured: The probe of that method.
    """
    peak = measured.peak_bytes(plan.micro_batch_tokens)
    facts = {
        "basis": "probe",
        "peak_bytes": peak,
        "seconds": measured.seconds(plan.tokens, steps=plan.steps),
        "fits": fits_in(peak, plan.machine),
    }
    methods = tuple(m.model_copy(update=facts) if m.kind == kind else m for m in plan.methods)
    return plan.model_copy(update={"methods": methods})


def _line(x0: float, y0: float, x1: float, y1: float, *, through_zero: bool) -> tuple[float, float]:
    """Intercept and slope; where two points make no rising line, one through zero, or a level one at the higher."""
    slope = (y1 - y0) / (x1 - x0) if x1 > x0 else 0.0
    if slope <= 0:
        return (0.0, y1 / x1) if through_zero else (max(y0, y1), 0.0)
    intercept = y0 - slope * x0
    return (intercept, slope) if intercept >= 0 else (0.0, y1 / x1)
