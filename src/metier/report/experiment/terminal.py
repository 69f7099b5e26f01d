"""The same figures for a terminal: one line an arm."""

from __future__ import annotations

from typing import TYPE_CHECKING

from metier.core.comparison import Arm
from metier.report.experiment.costs import mean
from metier.report.experiment.finding import beside
from metier.report.experiment.view import BASE, View
from metier.report.plots import power_of_ten
from metier.report.voice import plain

if TYPE_CHECKING:
    from rich.table import Table


def table(view: View) -> Table:
    """Base, cheap ways and arms: the primary figure, gain, what was kept, rate, cost."""
    from rich import box
    from rich.table import Table

    says = view.voice.say
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
    made.add_column(says("arm"), overflow="fold")
    heads = (view.measure(view.found.primary), says("gain"), says("kept_share"), says("learning_rate"))
    for head in (*heads, says("seconds_in_all"), says("memory"), says("bytes_on_disk")):
        made.add_column(_escaped(head), justify="right")
    if view.base is not None:
        made.add_row(_escaped(view.called(BASE)), plain(view.voice.amount(view.base.value, view.unit)))
    for baseline, figure in view.baselines():
        title = f"{view.voice.baseline(baseline)} ({says('untuned')})"
        made.add_row(_escaped(title), plain(view.voice.amount(figure.value, view.unit)))
    made.add_section()
    for arm in view.found.arms:
        made.add_row(*(_escaped(plain(cell)) for cell in _cells(view, arm)))
    return made


def _cells(view: View, arm: Arm) -> tuple[str, ...]:
    voice, figure, change = view.voice, view.figure(arm), beside(view, arm, BASE)
    gain = "-"
    if change is not None:
        gain = f"{voice.change(change.value, view.unit)} ({voice.interval(*change.ends, view.unit, signed=True)})"
    return (
        view.called(arm.name),
        voice.amount(figure.value, view.unit) if figure else voice.say("diverged"),
        gain,
        voice.amount(arm.kept.value, "share") if arm.kept else "-",
        power_of_ten(arm.learning_rate),
        voice.seconds(mean(arm, lambda cell: cell.seconds)),
        voice.size(arm.predicted.peak_memory_bytes_measured),
        voice.size(arm.bytes_on_disk),
    )


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
