"""What `metier plan` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from metier.evaluation.verdict import count

if TYPE_CHECKING:
    from metier.planning import MethodPlan, Plan


def show(plan: Plan) -> None:
    """One line a method, then the recommendation and what the figures do not know."""
    console = Console(highlight=False)
    memory = f"{plan.machine.memory_bytes / 1e9:.1f} GB free" if plan.machine.memory_bytes else "memory unknown"
    console.print(f"{plan.rows:,} rows, {plan.tokens:,} tokens in {plan.steps:,} steps, {plan.precision}; {memory}")
    table = Table(box=None, pad_edge=False)
    for title in ("method", "moves", "share", "peak memory", "time", "on disk", "fits", "by"):
        table.add_column(title, justify="left" if title == "method" else "right", overflow="fold")
    for method in plan.methods:
        table.add_row(*_row(method))
    console.print(table)
    console.print(f"\n{plan.recommendation}", markup=False)
    for note in plan.notes:
        console.print(f"note: {note}", markup=False)


def _row(method: MethodPlan) -> tuple[str, ...]:
    fits = {True: "yes", False: "no", None: "?"}[method.fits]
    return (
        method.title,
        count(method.parameters_moved),
        f"{method.share_moved:.2%}",
        f"{method.peak_bytes / 1e9:.2f} GB",
        "?" if method.seconds is None else duration(method.seconds),
        f"{method.bytes_on_disk / 1e6:,.0f} MB",
        fits,
        method.basis,
    )


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
