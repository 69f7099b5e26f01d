"""Gathering everything that is wrong with a file before anything is refused."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from metier.core import DataError, Fault, MetierError
from metier.core.words import first_few

SHOWN = 20


class Faults:
    """The faults of one file by kind, so that a thousand equal ones read as one."""

    def __init__(self, file: str) -> None:
        """Start with none for `file`."""
        self.file = file
        self._by_kind: dict[str, list[Fault]] = defaultdict(list)

    @classmethod
    def of(cls, error: MetierError) -> Faults:
        """The faults of an error, to be raised together with others."""
        faults = cls(error.faults[0].where)
        for number, fault in enumerate(error.faults):
            faults.add(str(number), fault.where, fault.what, fault.hint)
        return faults

    def add(self, kind: str, where: str, what: str, hint: str = "") -> None:
        """Note one fault; `kind` is what it has in common with its like, in words."""
        self._by_kind[kind].append(Fault(where, what, hint))

    def extend(self, other: Faults) -> None:
        """Take over what another gathered."""
        for kind, faults in other._by_kind.items():
            self._by_kind[kind] += faults

    def __bool__(self) -> bool:
        return bool(self._by_kind)

    def shown(self) -> Iterator[Fault]:
        """At most about twenty faults, each kind followed by the count of those left out."""
        each = max(2, SHOWN // max(1, len(self._by_kind)))
        for kind, faults in self._by_kind.items():
            yield from faults[:each]
            if len(faults) > each:
                yield Fault(self.file, f"and {len(faults) - each} more of the same kind ({kind})", "")


def refuse(*gathered: Faults) -> None:
    """Raise what was gathered, if anything was.

    Raises:
        DataError: With the faults of every file, in the order given.
    """
    shown = [fault for faults in gathered for fault in faults.shown()]
    if shown:
        raise DataError.of(shown)


def count(number: int, one: str, many: str = "") -> str:
    """A number with its noun: "1 row", "2,000 rows"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def listed(words: Sequence[str], most: int = 8) -> str:
    """The first few words of a list and how many follow."""
    return first_few([excerpt(word, 40) or "(nameless)" for word in words], most)


def excerpt(text: str, most: int = 60) -> str:
    """The beginning of a text on one line."""
    flat = " ".join(text[: 4 * most].split())
    return flat if len(flat) <= most else flat[: most - 1] + "…"


def nearest(word: str, options: Iterable[str], likeness: float = 0.6) -> str | None:
    """The option most like a word, for "did you mean"; very long ones are no names and are passed over."""
    names = [option for option in options if len(option) <= 100]
    return next(iter(difflib.get_close_matches(word[:100], names, 1, likeness)), None)
