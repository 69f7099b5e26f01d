"""What runs of this machine took, so that the next plan need not guess: small files in metier's cache."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from metier.core import StorageError, heap, log
from metier.core.evidence import Value
from metier.core.files import cache_root, discard, write_text
from metier.core.version import __version__
from metier.planning.plans import fits_in

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from metier.planning.plans import MethodPlan, Plan

MOST_FILES = 256
"""Runs that are remembered; the oldest make room."""
CPU_INFO = Path("/proc/cpuinfo")


class Seen(Value):
    """What a run or a probe took, beside what the formulas had said of it."""

    date: str
    """The day, as YYYY-MM-DD."""
    peak_bytes: int
    """Highest memory in use while it trained."""
    seconds: float = Field(gt=0)
    """Time of its steps, evaluation not included."""
    tokens: int = Field(gt=0)
    """Tokens of the rows that these steps learnt from."""
    formula_bytes: int
    """The peak by formula."""
    flops_per_token: float
    """Floating-point operations for each of the tokens by formula; 0 where no formula knows the network."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What of a run, beside its plan, decides what it takes.

    Attributes:
        network: What the network is made of.
        device: "cpu", "cuda:0" and so on.
        options: Choices of the recipe that change memory or time, as plain values.
    """

    network: str
    device: str
    options: Mapping[str, Any]

    def key(self, plan: Plan, method: MethodPlan) -> str:
        """A name for runs that take alike: same machine, network, method, options and size of budget."""
        said = {
            "machine": _machine(self.device),
            "network": self.network,
            "method": [method.kind, method.title, method.checkpointing, plan.precision],
            "options": self.options,
            # Budgets of like size take alike; what differs within a power of two, the formula knows.
            "budget": (method.budget.tokens - 1).bit_length(),
            "metier": __version__,
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:32]


def remember(setting: Setting, plan: Plan, method: MethodPlan, *, tokens: int, peak_bytes: int, seconds: float) -> None:
    """Keep what a run or a probe took; a cache that cannot be written is told, and the run goes on.

    Args:
        setting: Where and with what it ran.
        plan: The plan it ran by.
        method: The plan of its method.
        tokens: Tokens of the rows that were learnt from.
        peak_bytes: Highest memory in use.
        seconds: Time of the steps.
    """
    found = Seen(
        date=datetime.now(UTC).date().isoformat(),
        peak_bytes=peak_bytes,
        seconds=seconds,
        tokens=tokens,
        formula_bytes=method.memory.peak,
        flops_per_token=method.flops / plan.tokens,
    )
    path = _folder() / f"{setting.key(plan, method)}.json"
    try:
        write_text(path, found.model_dump_json() + "\n")
        for old in _beyond_what_is_kept():
            discard(old)
    except (StorageError, OSError) as error:
        log.warn(f"what this run took is not remembered for later plans: {error}")


def recall(setting: Setting, plan: Plan, method: MethodPlan) -> Seen | None:
    """What a run like it took, None where none was seen; a damaged file is told and passed over."""
    path = _folder() / f"{setting.key(plan, method)}.json"
    try:
        return Seen.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError):
        log.warn(f"{path} is damaged and passed over; the next such run writes it anew")
        return None


def informed(plan: Plan, setting: Setting) -> Plan:
    """The plan with peak and time of every method as a run or probe of this machine took them, and a note that says so.

    Where rows or steps are others than then, the formula says by how much they differ: it errs less on a difference
    than on the whole. Budgets stay as they are, so that a recipe is cut alike before and after.
    """
    found = {method.kind: recall(setting, plan, method) for method in plan.methods}
    methods = tuple(
        method if (seen := found[method.kind]) is None else _measured(plan, method, seen) for method in plan.methods
    )
    said = [f"{kind} on {seen.date}" for kind, seen in found.items() if seen is not None]
    if not said:
        return plan
    note = f"peak memory and time measured on this machine: {', '.join(said)}"
    return plan.model_copy(update={"methods": methods, "notes": (note, *plan.notes)})


def _measured(plan: Plan, method: MethodPlan, seen: Seen) -> MethodPlan:
    peak = max(0, seen.peak_bytes + method.memory.peak - seen.formula_bytes)
    more = method.flops / plan.tokens / seen.flops_per_token if seen.flops_per_token else 1.0
    facts = {
        "basis": "measured",
        "measured_on": seen.date,
        "peak_bytes": peak,
        "fits": fits_in(peak, plan.machine),
        "seconds": seen.seconds / seen.tokens * plan.tokens * more,
    }
    return method.model_copy(update=facts)


def _folder() -> Path:
    return cache_root() / "seen"


def _beyond_what_is_kept() -> Sequence[Path]:
    """Files beyond those that are remembered."""
    found = sorted(_folder().glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    return found[MOST_FILES:]


def _machine(device: str) -> list[Any]:
    """What decides speed and memory of a machine; nothing that names it."""
    import torch

    if device.startswith("cuda"):
        return [torch.cuda.get_device_name(device), torch.__version__]
    return [_processor(), device, torch.get_num_threads(), torch.__version__, heap.is_dense()]


def _processor() -> str:
    if CPU_INFO.exists():
        for line in CPU_INFO.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
