"""What rows can get wrong together: repeats across the splits, classes that do not match, answers given away."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from metier.core.rng import derive
from metier.data import personal, similar
from metier.data.content import asked, before_answer, digest, normalised
from metier.data.faults import Faults, count, excerpt, listed, nearest
from metier.data.records import Labelled, Record, pick
from metier.recipe import DataSection

Target = Callable[[Record], str | None]

PAIRS_SHOWN = 5
LEAK_SHARE = 0.9
"""Share of rows whose own label stands in the text from which the label counts as given away."""
GIVEN_SHARE = 0.5
"""Share of prompts that end with their answer from which the data cannot teach anything."""
LEAST_ROWS = 10
"""Fewer rows show no pattern."""


@dataclass(frozen=True, slots=True)
class Side:
    """One split under check.

    Attributes:
        name: "train", "validation" or "test".
        file: The file it comes from.
        records: Its rows.
    """

    name: str
    file: str
    records: Sequence[Record]


def overlap(train: Side, other: Side, section: DataSection, faults: Faults) -> tuple[Side, list[str]]:
    """The training rows that may stay, and a note, after comparing them with rows that judge.

    A refusal is added to `faults` with up to five pairs.
    """
    pairs = similar.pairs_between(map(asked, train.records), map(asked, other.records))
    sharing = _same_group(train, other, section.group) - {pair.left for pair in pairs}
    if not pairs and not sharing:
        return train, []
    exact = sum(pair.exact for pair in pairs)
    parts = (
        (exact, "word for word"),
        (len(pairs) - exact, "nearly"),
        (len(sharing), f"by the same {section.group}"),
    )
    how = ", ".join(f"{number:,} {words}" for number, words in parts if number)
    said = f"{count(len(pairs) + len(sharing), 'training row')} also in {other.name} ({other.file}): {how}"
    if section.overlap == "drop":
        gone = sharing | {pair.left for pair in pairs}
        kept = [index for index in range(len(train.records)) if index not in gone]
        return Side(train.name, train.file, pick(train.records, kept)), [
            f"{said}. They are left out of training, as data.overlap=drop says."
        ]
    if section.overlap == "allow":
        return train, [f"{said}. They stay, as data.overlap=allow says: the figures flatter the tuned model."]
    faults.add("overlap", train.file, said, REMEDIES)
    for pair in sorted(pairs, key=lambda pair: (-pair.exact, -pair.likeness))[:PAIRS_SHOWN]:
        how = "word for word" if pair.exact else f"Jaccard {pair.likeness:.2f}"
        row, twin = train.records[pair.left], other.records[pair.right]
        shown = excerpt(personal.without(asked(row)[:1000]))
        faults.add("overlapping pair", row.where, f"stands at {twin.where} too ({how}): {shown!r}")
    return train, []


REMEDIES = (
    "data.overlap=drop leaves these rows out of training; data.overlap=allow keeps them and the report says so; "
    "or take them out of one of the files"
)


def shared(validation: Side, test: Side) -> list[str]:
    """A note on rows that both choose the best step and judge it."""
    pairs = similar.pairs_between(map(asked, validation.records), map(asked, test.records))
    if not pairs:
        return []
    first = f"{validation.records[pairs[0].left].where} and {test.records[pairs[0].right].where}"
    return [f"{count(len(pairs), 'validation row')} also in test (such as {first}): the best step is chosen by them."]


def _same_group(train: Side, other: Side, group: str | None) -> set[int]:
    """Training rows whose group also stands on the other side."""
    if group is None:
        return set()
    there = {str(row.extras[group]) for row in other.records if group in row.extras}
    return {index for index, row in enumerate(train.records) if str(row.extras.get(group)) in there}


def group_column(side: Side, group: str, faults: Faults) -> None:
    """Every training row must say which group it belongs to."""
    if not any(group in row.extras for row in side.records):
        columns = list(dict.fromkeys(column for row in side.records for column in row.extras))
        near = nearest(group, columns)
        hint = f"did you mean {near}?" if near else f"columns not learnt: {listed(columns) or 'none'}"
        faults.add("no group", side.file, f"has no column {group!r}, which data.group names", hint)
        return
    for row in side.records:
        value = row.extras.get(group)
        if value in (None, "") or isinstance(value, list | dict):
            what = f"{group}, which data.group names, is not one word or number"
            faults.add("no group", row.where, what, "fill it: rows of one group stay on one side")


def repeats(side: Side) -> list[str]:
    """Notes on rows that ask the same, and on those that then answer differently."""
    texts, answers = array("Q"), array("Q")
    for row in side.records:
        texts.append(digest(normalised(asked(row))))
        answers.append(digest(row.label) if isinstance(row, Labelled) else 0)
    pairs = np.unique(np.stack([np.asarray(texts), np.asarray(answers)]), axis=1)
    distinct, answers_of = np.unique(pairs[0], return_counts=True)
    notes = []
    if (again := len(side.records) - len(distinct)) > 0:
        repeat = "repeats" if again == 1 else "repeat"
        notes.append(f"{side.file}: {count(again, 'row')} {repeat} another row word for word.")
    if torn := int((answers_of > 1).sum()):
        stand = "stands" if torn == 1 else "stand"
        notes.append(f"{side.file}: {count(torn, 'text')} {stand} under more than one label.")
    return notes


def labels(train: Side, others: Sequence[Side], faults: Faults) -> list[str]:
    """Classes must be two or more, and none may be met first in a test; notes on classes with one row."""
    have = Counter(row.label for row in train.records if isinstance(row, Labelled))
    if not have:
        return []
    if len(have) == 1:
        what = f"every row has the label {next(iter(have))!r}: there is nothing to tell apart"
        faults.add(
            "one class", train.file, what, "add rows of another class, or map another column: data.columns={label: …}"
        )
    if all(_fraction(label) for label in have):
        what = f"the labels are fractions such as {next(iter(have))!r}; a class is a word or an integer"
        faults.add("fractions", train.file, what, "map the column of the classes: data.columns={label: …}")
    for side in others:
        for row in side.records:
            if isinstance(row, Labelled) and row.label not in have:
                what = f"the label {row.label!r} never stands in {train.name}, which has {count(len(have), 'label')}: "
                shown = listed(sorted(have), 6)
                faults.add(
                    f"label unknown in {train.name}", row.where, what + shown, "add training rows of it, or take it out"
                )
    rare = sorted(label for label, number in have.items() if number < 2)
    notes = [f"{train.file}: {count(len(rare), 'label')} with a single training row: {listed(rare, 5)}."]
    return [*(notes if rare and len(have) > 1 else []), *_alike(train, have), *_one_sided(others, len(have))]


def _alike(train: Side, labels: Collection[str]) -> Iterator[str]:
    """A note on labels that a slip of the pen may have made two of."""
    by_key: dict[str, list[str]] = {}
    for label in sorted(labels):
        by_key.setdefault(" ".join(label.split()).casefold(), []).append(label)
    for same in by_key.values():
        if len(same) > 1:
            yield f"{train.file}: the labels {', '.join(map(repr, same))} differ only by case or spaces."


def _one_sided(others: Sequence[Side], classes: int) -> Iterator[str]:
    """A note on splits that judge by one class alone."""
    for side in others:
        there = {row.label for row in side.records if isinstance(row, Labelled)}
        if len(there) == 1 < classes:
            yield f"{side.name} shows only {there.pop()!r} of {classes} classes: its figures say nothing of the others."


def _fraction(label: str) -> bool:
    whole, dot, rest = label.lstrip("+-").partition(".")
    return bool(dot) and (whole + rest).isascii() and (whole + rest).isdigit()


def leaks(side: Side, target: Target, seed: int, faults: Faults) -> list[str]:
    """The answer must not stand where the model reads it.

    Each row is held against its own answer and against that of another row, so that a text that lists every label,
    or a prompt that ends "yes or no", is no leak.
    """
    answered = _Answered.of(side.records, target)
    if len(answered) < LEAST_ROWS:
        return []
    first = side.records[answered.rows[0]]
    if answered.distinct == 1:
        return [] if isinstance(first, Labelled) else [f"{side.file}: every row of {side.name} has the same answer."]
    given, own_number, other_number = "", 0, 0
    meets, read = (_stands, _padded) if isinstance(first, Labelled) else (_ends, _before)
    for row, own, other in answered.pairs(random.Random(derive(seed, "leaks"))):  # noqa: S311 - a draw, no secret
        text = read(row)
        if meets(own, text):
            given, own_number = given or row.where, own_number + 1
        other_number += meets(other, text)
    if isinstance(first, Labelled):
        rows = len(answered)
        return _label_leak(side, own_number / rows, other_number / rows, first.where, faults)
    return _given_away(side, given, own_number, other_number, len(answered), faults)


@dataclass(frozen=True, slots=True)
class _Answered:
    """The rows of a side that have an answer; answers are read again, for together they may not fit in memory.

    Attributes:
        records: All rows.
        target: Takes a row and gives its answer.
        rows: Indices of those that have one.
        which: For each the number of its answer among the different ones.
        example: For each different answer a row that has it.
    """

    records: Sequence[Record]
    target: Target
    rows: Sequence[int]
    which: Sequence[int]
    example: Sequence[int]

    @classmethod
    def of(cls, records: Sequence[Record], target: Target) -> _Answered:
        rows, digests = array("q"), array("Q")
        for index, row in enumerate(records):
            if own := normalised(target(row) or ""):
                rows.append(index)
                digests.append(digest(own))
        _, first, which = np.unique(np.asarray(digests), return_index=True, return_inverse=True)
        return cls(records, target, rows, array("q", which.tobytes()), array("q", np.asarray(rows)[first].tobytes()))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def distinct(self) -> int:
        """How many different answers there are."""
        return len(self.example)

    def pairs(self, chance: random.Random) -> Iterator[tuple[Record, str, str]]:
        """Each row with its own answer and with that of another row."""
        answer_of = lru_cache(1024)(lambda number: self._answer(self.records[self.example[number]]))
        for index, own in zip(self.rows, self.which, strict=True):
            row, drawn = self.records[index], chance.randrange(self.distinct - 1)
            yield row, self._answer(row), answer_of(drawn + (drawn >= own))

    def _answer(self, row: Record) -> str:
        return normalised(self.target(row) or "")


def _padded(row: Record) -> str:
    return f" {normalised(asked(row))} "


def _before(row: Record) -> str:
    return normalised(before_answer(row))


def _stands(label: str, text: str) -> bool:
    """Whether a label stands in a text as whole words; scripts without spaces have none."""
    return (f" {label} " if label.isascii() else label) in text


def _ends(answer: str, text: str) -> bool:
    return text.endswith(answer) and (not answer.isascii() or f" {text}".endswith(f" {answer}"))


def _label_leak(side: Side, own: float, other: float, where: str, faults: Faults) -> list[str]:
    if own >= LEAK_SHARE and other <= own / 2:
        what = f"in {own:.0%} of the rows of {side.name} the text holds its own label word for word"
        faults.add("label in the text", where, what, "take the label out of the text, or map another column")
    return []


def _given_away(side: Side, first: str, given: int, by_chance: int, rows: int, faults: Faults) -> list[str]:
    if given <= 2 * by_chance:
        return []
    what = f"{count(given, 'prompt')} of {rows:,} in {side.name} already end with the answer"
    if given > GIVEN_SHARE * rows:
        faults.add("answer in the prompt", first, what, "take the answer out of the prompt")
        return []
    return [f"{side.file}: {what} (first at {first})."]


def personal_data(sides: Sequence[Side], section: DataSection, faults: Faults) -> list[str]:
    """What was found, as notes or as faults; nothing where the recipe says to ignore it."""
    if section.personal_data == "ignore":
        return []
    notes = []
    for found in personal.find(row for side in sides for row in side.records):
        said = f"{found.kind}: {found.number:,} in {count(found.rows, 'row')}, such as {', '.join(found.samples)}"
        if section.personal_data == "refuse":
            hint = "take them out; data.personal_data=warn only tells, =ignore does not look"
            faults.add(found.kind, found.samples[0].partition(" (")[0], said, hint)
        notes.append(f"The rows hold {said}.")
    return notes if section.personal_data == "warn" else []


def without_personal_data(sides: Mapping[str, Side], faults: Faults) -> tuple[dict[str, Side], list[str]]:
    """The splits without the rows that hold any, and how many these were; a split that loses all is a fault."""
    kept, notes = dict[str, Side](), list[str]()
    for name, side in sides.items():
        places = [place for place, row in enumerate(side.records) if not personal.holds(row)]
        gone = len(side.records) - len(places)
        kept[name] = Side(name, side.file, pick(side.records, places)) if gone else side
        if gone:
            said = f"{count(gone, 'row')} of {len(side.records):,} in {name} with personal data"
            notes.append(f"{said} are left out, as data.personal_data=drop says." if places else f"{said}.")
        if not places:
            faults.add(
                "no rows", side.file, f"no {name} row is without personal data", "set data.personal_data to warn"
            )
    return kept, notes
