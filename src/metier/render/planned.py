"""What `metier plan` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from metier.render.screen import screen
from metier.report import Voice

if TYPE_CHECKING:
    from metier.planning import MethodPlan, Plan


def show(plan: Plan) -> None:
    """One line a method, then the recommendation and what the figures do not know."""
    console, voice = screen(), Voice("en")
    memory = f"{voice.size(plan.machine.memory_bytes)} free" if plan.machine.memory_bytes else "memory unknown"
    console.print(f"{plan.rows:,} rows, {plan.tokens:,} tokens in {plan.steps:,} steps, {plan.precision}; {memory}")
    console.print(f"at most {plan.budget.tokens:,} tokens are read at once: {plan.budget.reason}", markup=False)
    table = Table(box=None, pad_edge=False)
    for title in ("method", "moves", "share", "peak memory", "time", "on disk", "fits", "by"):
        table.add_column(title, justify="left" if title == "method" else "right", overflow="fold")
    for method in plan.methods:
        table.add_row(*_row(method, voice))
    console.print(table)
    console.print(f"\n{plan.recommendation}", markup=False)
    for note in plan.notes:
        console.print(f"note: {note}", markup=False)


def _row(method: MethodPlan, voice: Voice) -> tuple[str, ...]:
    fits = {True: "yes", False: "no", None: "?"}[method.fits]
    return (
        method.title,
        voice.parameters(method.parameters_moved),
        f"{method.share_moved:.2%}",
        voice.size(method.peak_bytes),
        "?" if method.seconds is None else voice.seconds(method.seconds),
        voice.size(method.bytes_on_disk),
        fits,
        method.basis,
    )
