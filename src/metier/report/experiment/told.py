"""Test rows with the answers of every arm, sorted by who was right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from metier.core.comparison import Told
from metier.report.answers import Text, text_of, visible
from metier.report.experiment.view import BASE, View

GROUPS = ("differ", "win", "loss_group", "all_wrong", "all_right", "unjudged")
"""Every group, in the order of the page: where arms differ comes first."""


@dataclass(frozen=True, slots=True)
class Said:
    """One answer: whose, and whether it is right."""

    name: str
    style: str
    text: Text
    is_right: bool | None


@dataclass(frozen=True, slots=True)
class Example:
    """One test row."""

    where: str
    prompt: Text
    reference: Text
    answers: Sequence[Said]


def group(row: Told) -> str:
    """Which of `GROUPS` a row belongs to."""
    arms = [right for name, right in row.right.items() if name != BASE]
    before = row.right.get(BASE)
    if not arms:
        return "unjudged"
    if any(arms) and not all(arms):
        return "differ"
    if before is None or before == arms[0]:
        return "all_right" if arms[0] else "all_wrong"
    return "win" if arms[0] else "loss_group"


def grouped(view: View) -> dict[str, list[Example]]:
    """The rows by group, without empty groups."""
    found: dict[str, list[Example]] = {name: [] for name in GROUPS}
    for row in view.found.told:
        found[group(row)].append(_example(view, row))
    return {name: rows for name, rows in found.items() if rows}


def _example(view: View, row: Told) -> Example:
    reference = visible(row.reference)
    return Example(
        where=row.where,
        prompt=text_of(visible(row.prompt)),
        reference=text_of(reference),
        answers=[
            Said(view.called(name), view.style(name), text_of(visible(answer), reference), row.right.get(name))
            for name, answer in row.answers.items()
        ],
    )
