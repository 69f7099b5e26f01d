"""What `metier evaluate` shows, and its gates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.table import Table

from metier.core import Fault, GateError, MetierError, RecipeError
from metier.core.evidence import Measure
from metier.render.screen import screen
from metier.report import Voice, plain


def show(measures: Sequence[Measure]) -> None:
    """One line a metric, with its interval."""
    voice = Voice("en")
    table = Table(box=None, pad_edge=False)
    for title in ("metric", "value", "low", "high", "rows"):
        table.add_column(title, justify="left" if title == "metric" else "right")
    for measure in measures:
        found = measure.after
        figures = [plain(voice.amount(value, measure.unit)) for value in (found.value, found.low, found.high)]
        table.add_row(measure.title, *figures, str(found.n))
    screen().print(table)


def read_gates(wanted: Sequence[str]) -> dict[str, float]:
    """The gates of the command line, METRIC=VALUE each.

    Raises:
        RecipeError: With every gate that is no such thing.
    """
    gates: dict[str, float] = {}
    faults = []
    for text in wanted:
        name, _, value = text.partition("=")
        try:
            gates[name] = float(value)
        except ValueError:
            gates[name] = math.nan
        if not name or not math.isfinite(gates[name]):
            faults.append(Fault(f"--fail-under {text}", "a gate is METRIC=VALUE", "for example exact_match=0.8"))
    if faults:
        raise RecipeError.of(faults)
    return gates


def missed(measures: Sequence[Measure], gates: Mapping[str, float]) -> MetierError | None:
    """The gates that were not met, as one error; None where all were.

    Raises:
        RecipeError: If a gate names no metric.
    """
    by_name = {measure.name: measure for measure in measures}
    unknown = [
        Fault(f"--fail-under {name}", "no such metric", f"metrics here: {', '.join(by_name)}")
        for name in gates
        if name not in by_name
    ]
    if unknown:
        raise RecipeError.of(unknown)
    faults = []
    for name, limit in gates.items():
        found, higher = by_name[name].after.value, by_name[name].higher_is_better
        if found < limit if higher else found > limit:
            hint = f"tune further, or {'lower' if higher else 'raise'} the gate"
            faults.append(Fault(f"--fail-under {name}={limit:g}", f"{by_name[name].title} is {found:.4f}", hint))
    return GateError.of(faults) if faults else None
