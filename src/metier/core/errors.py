"""Everything that can go wrong, as one small tree; each leaf knows its exit code.

MetierError                 1   never raised itself
├── RecipeError             2   the recipe or the command line asks for something that cannot be
├── GateError               3   a measured figure stayed below the gate the user set
├── DataError              65   a file, a row or a split is not what the task needs
├── ModelError             65   a checkpoint cannot be loaded
├── DivergedError          70   the loss or the gradient stopped being a number, or the weights are being ruined
├── BusyError              73   another process writes to the same run folder
├── StorageError           74   the disk is full or a file cannot be written
├── InterruptedRunError    75   stopped by a signal; the same command resumes
└── UnsafeError            77   refused for safety

Every message has three parts: where, what happened, and what to do next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        where: File and line ("train.jsonl:12"), or the recipe key, or the command-line word.
        what: What was found there.
        hint: What to do about it.
    """

    where: str
    what: str
    hint: str

    def __str__(self) -> str:
        """The fault as one line: `where: what - hint`."""
        return f"{self.where}: {self.what} - {self.hint}" if self.hint else f"{self.where}: {self.what}"


class MetierError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str, hint: str) -> None:
        """Compose the message of a single fault."""
        self.faults: tuple[Fault, ...] = (Fault(where, what, hint),)
        super().__init__(str(self.faults[0]))

    @classmethod
    def of(cls, faults: Iterable[Fault]) -> MetierError:
        """One error that carries several faults, in the order given; there must be at least one."""
        found = tuple(faults)
        error = cls(found[0].what, where=found[0].where, hint=found[0].hint)
        error.faults = found
        error.args = ("\n".join(str(fault) for fault in found),)
        return error


class RecipeError(MetierError):
    """The recipe or the command line asks for something that cannot be."""

    exit_code = 2


class GateError(MetierError):
    """A measured figure stayed below the gate the user set."""

    exit_code = 3


class DataError(MetierError):
    """A file, a row or a split is not what the task needs."""

    exit_code = 65


class ModelError(MetierError):
    """A checkpoint cannot be loaded."""

    exit_code = 65


class DivergedError(MetierError):
    """The loss or the gradient is not finite, or the weights are being ruined; the step was not taken."""

    exit_code = 70


class BusyError(MetierError):
    """Another process writes to the same run folder."""

    exit_code = 73


class StorageError(MetierError):
    """The disk is full or a file cannot be written."""

    exit_code = 74


class InterruptedRunError(MetierError):
    """Stopped by a signal; what was learnt is saved and the same command resumes."""

    exit_code = 75


class UnsafeError(MetierError):
    """Refused for safety."""

    exit_code = 77
