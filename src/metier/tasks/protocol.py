"""What every task promises.

Shapes: B examples of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from metier.core import Batch, Loss
    from metier.data.records import Record

Example = TypeVar("Example")


@dataclass(frozen=True, slots=True)
class Shown:
    """One example as the model meets it.

    Attributes:
        where: File and line of the row.
        parts: The text in order, each piece with whether it is learnt.
    """

    where: str
    parts: tuple[tuple[str, bool], ...]


@dataclass(frozen=True, slots=True)
class Answering:
    """How answers are made.

    Attributes:
        max_new_tokens: Longest answer.
        batch_tokens: Most tokens, padding included, that are answered at once.
    """

    max_new_tokens: int = 128
    batch_tokens: int = 8192


class Task(Protocol[Example]):
    """One thing a model can be taught: all that the training loop and the validation need.

    Attributes:
        kind: The recipe's word for it.
        unit: What `Loss.weight_B` counts, singular, as it is printed: "token", "row", "value".
    """

    @property
    def kind(self) -> str: ...  # noqa: D102 - told above

    @property
    def unit(self) -> str: ...  # noqa: D102

    def encode(self, records: Sequence[Record], *, training: bool) -> Sequence[Example]:
        """Turn rows into examples; one row may give several.

        Raises:
            DataError: With every row that cannot be learnt from: nothing supervised, an answer that would be cut.
        """
        ...

    def size(self, example: Example) -> int:
        """What the example costs, in tokens."""
        ...

    def suited(self, module: nn.Module) -> Self:
        """The same task, its batches laid out as this network reads best."""
        ...

    def cut(self, examples: Sequence[Example], most_tokens: int) -> tuple[tuple[int, ...], ...]:
        """Which examples are read at once, as groups of indices that each read at most so many tokens, or one example.

        How examples are grouped changes neither loss nor gradient.
        """
        ...

    def read(self, examples: Sequence[Example]) -> int:
        """Tokens that the network reads when these examples are one batch: padding counted, shared beginnings once."""
        ...

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Put examples into one batch; neither padding nor neighbours change the loss.

        The same examples always give the same batch: it may be made before the step that it belongs to.
        """
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Score the batch, one sum for each example; other examples and padding never change it."""
        ...

    def show(self, example: Example) -> Shown:
        """The example as text, with what is learnt marked."""
        ...


class TextTask(Task[Example], Protocol[Example]):
    """A task whose answers are text.

    Attributes:
        metrics: Names in the metric table that fit its answers; the first one decides.
        retains: What can be lost: a language model's general text, an encoder's sense of likeness, or nothing
            that we can measure.
    """

    @property
    def metrics(self) -> tuple[str, ...]: ...  # noqa: D102 - told above

    @property
    def retains(self) -> Literal["language", "encoder", "none"]: ...  # noqa: D102

    def question(self, record: Record) -> str:
        """What is asked, for people."""
        ...

    def reference(self, record: Record) -> str:
        """The right answer, as the data has it."""
        ...

    def answer(self, model: nn.Module, records: Sequence[Record], how: Answering) -> list[str]:
        """Let the model answer each row's question, without looking at the reference."""
        ...

    def with_answer(self, record: Record, answer: str) -> Record:
        """The row with another answer in place of the reference."""
        ...
