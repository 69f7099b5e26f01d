"""The same figures for a terminal: a plain summary of one run, and one table of several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from metier.core.evidence import Estimate, Evidence
from metier.report import figures, page
from metier.report.answers import visible
from metier.report.plots import columns
from metier.report.voice import Voice, plain

if TYPE_CHECKING:
    from rich.table import Table


def summary(evidence: Evidence, voice: Voice) -> str:
    """The verdict and a small aligned table, as plain text without colour."""
    heads = ["", *(voice.say(key) for key in ("base", "tuned", "change")), ""]
    lines = [heads]
    for measure in evidence.measures:
        change = measure.change
        lines.append(
            [
                voice.measure(measure),
                voice.amount(measure.before.value, measure.unit) if measure.before else "-",
                voice.amount(measure.after.value, measure.unit),
                _change_text(change, measure.unit, voice) if change else "-",
                voice.say(measure.verdict) if change else "",
            ]
        )
    baselines = list(_baseline_lines(evidence, voice))
    cost = f"{voice.seconds(page.total_seconds(evidence))}, {voice.size(page.peak_memory_bytes(evidence))}"
    moved = page.percent(page.moved_share(evidence))
    lasts = [
        f"{voice.say('cost')}: {cost}, {voice.say('tile_disk_note', share=moved)}, "
        f"{voice.say('to_store', size=voice.size(evidence.cost.bytes_on_disk))}"
    ]
    blocks = [evidence.verdict, aligned(lines), baselines, lasts]
    return plain("\n\n".join("\n".join(block) for block in blocks if block))


def compare_table(runs: Sequence[tuple[str, Evidence]], voice: Voice, measures: Sequence[str] | None) -> Table:
    """Base and runs side by side: every measure, then cost, then what the baselines reach."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
    table.add_column("")
    for head in (voice.say("base"), *(label for label, _ in runs)):
        table.add_column(head, justify="right")
    for line in _measure_lines(runs, voice, measures):
        table.add_row(*map(plain, line))
    table.add_section()
    for line in _cost_lines(runs, voice):
        table.add_row(*line)
    cheap = list(_cheap_lines(runs, voice))
    if cheap:
        table.add_section()
        table.add_row(f"[bold]{voice.say('without_tuning')}[/bold]")
        for line in cheap:
            table.add_row(*line)
    return table


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Rows as text in columns, the first to the left, numbers to the right, the last to the left."""
    shown = [[visible(cell) for cell in line] for line in lines]
    widths = [max(columns(line[i]) for line in shown) for i in range(len(shown[0]))]
    return [_aligned(line, widths) for line in shown]


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    first, *middle, last = line
    cells = [first + " " * (widths[0] - columns(first))]
    cells += [" " * (width - columns(cell)) + cell for cell, width in zip(middle, widths[1:-1], strict=True)]
    return "  ".join([*cells, last]).rstrip()


def _change_text(change: Estimate, unit: str, voice: Voice) -> str:
    interval = figures.interval_text(change, unit, voice, signed=True)
    return f"{voice.change(change.value, unit)} ({interval})"


def _baseline_lines(evidence: Evidence, voice: Voice) -> Iterator[str]:
    measure = page.primary_of(evidence)
    if measure is None:
        return
    for baseline, estimate in figures.baselines_of(measure.name, [("", evidence)]):
        amount = voice.amount(estimate.value, measure.unit)
        yield f"{voice.say('without_tuning')}: {voice.baseline(baseline)}, {voice.measure(measure)} {amount}"


def _measure_lines(
    runs: Sequence[tuple[str, Evidence]], voice: Voice, measures: Sequence[str] | None
) -> Iterator[list[str]]:
    for group in ("domain", "retention"):
        for name in figures.measure_names(runs, group):
            if measures is None or name in measures:
                yield _measure_line(name, runs, voice)


def _measure_line(name: str, runs: Sequence[tuple[str, Evidence]], voice: Voice) -> list[str]:
    found = [figures.measure_of(evidence, name) for _, evidence in runs]
    measure = next(m for m in found if m is not None)
    estimates = [figures.base_of(name, runs), *(m.after if m else None for m in found)]
    return [_escaped(voice.measure(measure)), *_amounts(estimates, measure.unit, voice)]


def _amounts(estimates: Iterable[Estimate | None], unit: str, voice: Voice) -> list[str]:
    return ["-" if e is None else voice.amount(e.value, unit) for e in estimates]


def _cost_lines(runs: Sequence[tuple[str, Evidence]], voice: Voice) -> Iterator[list[str]]:
    found = [evidence for _, evidence in runs]
    yield [voice.say("trainable_share"), "", *(page.percent(page.moved_share(e)) for e in found)]
    yield [voice.say("train_seconds"), "", *(voice.seconds(page.train_seconds(e)) for e in found)]
    yield [voice.say("total_seconds"), "", *(voice.seconds(page.total_seconds(e)) for e in found)]
    yield [voice.say("memory"), "", *(voice.size(page.peak_memory_bytes(e)) for e in found)]
    yield [voice.say("bytes_on_disk"), "", *(voice.size(e.cost.bytes_on_disk) for e in found)]


def _cheap_lines(runs: Sequence[tuple[str, Evidence]], voice: Voice) -> Iterator[list[str]]:
    measure = page.primary_of(runs[0][1])
    if measure is None:
        return
    for baseline, estimate in figures.baselines_of(measure.name, runs):
        title = f"{voice.baseline(baseline)} ({voice.measure(measure)})"
        yield [_escaped(title), plain(voice.amount(estimate.value, measure.unit))]


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(visible(text))
