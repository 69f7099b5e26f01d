"""How many tokens are read at once, where the recipe leaves it to the plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from metier.core.evidence import Value

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SIZES = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
"""Budgets that are weighed: powers of two, so that a little more or less free memory rarely changes the choice."""
CPU_SECONDS = {512: 1.12, 1024: 1.0, 2048: 0.98, 4096: 1.0}
"""Time of a token on a CPU by the tokens that are read at once, beside 1,024. Measured with SmolLM2-135M on GSM8K by
the time of one AVX-512 core, sizes in turns: 196, 202 and 204 tokens a second with LoRA in packs of 1,024, 2,048 and
4,096, 164, 167 and 157 fully tuned; 512 on a busy machine."""
EQUAL = 0.05
"""Share of the time by which a larger size must be faster to be worth its memory. Judgement."""
LEAST = 16
"""The recipe takes no smaller number."""
LEAST_KEPT = 2048
"""On a GPU, activations are computed again rather than fewer tokens read at once. Judgement: fewer leave it idle."""


class Budget(Value):
    """The most tokens of a micro-batch, and why."""

    tokens: int
    """The number."""
    reason: str
    """Why, as part of a sentence."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a budget makes of a run's steps.

    Attributes:
        largest: Tokens of the largest micro-batch, padding included, shared beginnings once.
        share: Tokens that are read for each token of the rows: more than 1 with padding, less where rows share.
    """

    largest: int
    share: float


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps of a run, as far as their batches were looked at.

    Attributes:
        whole: Tokens of the largest step.
        read: What a budget makes of them.
    """

    whole: int
    read: Callable[[int], Reading]


def chosen(steps: Steps, *, device: str, fits: Callable[[int], bool]) -> Budget:
    """The budget that takes least time among those that fit; never more than a step holds.

    On a CPU a token costs more in a small micro-batch, for which the weights are passed over all the same, and less
    where rows that share a beginning are read together: the real steps are cut with every size, and the smallest wins
    that is about as fast as any. On a GPU more tokens at once are never slower, so that memory decides.

    Args:
        steps: What is read.
        device: "cpu", or a kind of GPU.
        fits: Whether a micro-batch of so many tokens fits in memory; True where nobody knows.
    """
    sizes = [size for size in SIZES if size < steps.whole and (device != "cpu" or size in CPU_SECONDS)]
    if device != "cpu" or steps.whole <= max(CPU_SECONDS):
        sizes.append(steps.whole)
    fitting = [size for size in sizes if fits(size)]
    if not fitting:
        return Budget(
            tokens=max(sizes[0], LEAST), reason="even the least that is worth reading at once may not fit in memory"
        )
    best = _fastest(steps, fitting) if device == "cpu" else fitting[-1]
    if best == steps.whole:
        return Budget(tokens=max(best, LEAST), reason="no step holds more")
    if best == fitting[-1] and len(fitting) < len(sizes):
        return Budget(tokens=best, reason=f"more does not fit in memory; a step holds {steps.whole:,}")
    reason = f"more at once would gain little time on a CPU; a step holds {steps.whole:,}"
    return Budget(tokens=best, reason=reason)


def whole_or_less(steps: Steps, *, fits: Callable[[int], bool | None]) -> Budget:
    """For a network of which only memory is known: a whole step, or as much of it as fits."""
    tokens = steps.whole
    while fits(tokens) is False and tokens > LEAST:
        tokens //= 2
    if tokens == steps.whole:
        return Budget(tokens=max(tokens, LEAST), reason="no step holds more")
    return Budget(tokens=max(tokens, LEAST), reason=f"more does not fit in memory; a step holds {steps.whole:,}")


def least_kept(steps: Steps, *, device: str) -> int:
    """Tokens at once below which computing activations again is the lesser evil."""
    return min(steps.whole, SIZES[0] if device == "cpu" else LEAST_KEPT)


def _fastest(steps: Steps, sizes: Sequence[int]) -> int:
    """The smallest size that is about as fast as any, by what was measured at the next larger one."""
    seconds = {
        size: steps.read(size).share * next(cost for tokens, cost in CPU_SECONDS.items() if tokens >= size)
        for size in sizes
    }
    least = min(seconds.values())
    return next(size for size in sizes if seconds[size] <= (1 + EQUAL) * least)
