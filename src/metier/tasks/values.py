"""Tasks whose answers are numbers: the base of a task of one's own, and what all of them share.

Shapes: B rows, P targets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from metier.core import Batch, Fault, Loss, ModelError
from metier.core.words import first_few
from metier.tasks.cutting import Unpacked
from metier.tasks.protocol import Shown
from metier.tasks.refusal import Refusals
from metier.tasks.scoring import to_device

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from metier.data.records import Record

    Values = NDArray[np.float64]

Content = TypeVar("Content")
TARGET = "target"
"""Key of the targets in a batch; the other keys are the network's arguments."""
MOST_COST = 8192
"""Cost of the rows answered at once, in the unit of `train.micro_batch_tokens`."""
SHOWN_CHARACTERS = 500


@dataclass(frozen=True, slots=True)
class Placed(Generic[Content]):
    """What `example` made of a row.

    Attributes:
        where: File and line of the row.
        row: The row as it stands.
        content: What the task keeps of it.
    """

    where: str
    row: Mapping[str, Any]
    content: Content


class ValueTask(Unpacked, ABC, Generic[Content]):
    """Numbers to predict from rows, for any network: write `names`, `example` and `batch`, and it can be tuned.

    The network is called with the batch's tensors by name and answers with shape (B, P), or (B,) for one target. The
    loss is the squared error over what was measured; override `loss` for another.

    Attributes:
        names: What is predicted, one name for each target.
    """

    kind: str = "own"
    unit: str = "value"
    names: tuple[str, ...]

    @abstractmethod
    def example(self, row: Mapping[str, Any]) -> Content:
        """What is kept of a row, from column to value; raise ValueError or KeyError where it cannot be read."""

    @abstractmethod
    def batch(self, contents: Sequence[Content]) -> tuple[Mapping[str, Tensor], Tensor]:
        """The network's arguments by name, and the targets, shape (B, P), NaN where nothing was measured."""

    def features(self, contents: Sequence[Content]) -> Any:  # noqa: ARG002 - for whoever overrides it
        """A matrix (B, F), dense or sparse, from which cheap models may predict; None where there is none."""
        return None

    def groups(self, records: Sequence[Record]) -> Mapping[str, NDArray[np.str_]]:  # noqa: ARG002
        """Values of each grouping of the rows by which the figures are also given; none by default."""
        return {}

    def calibrate(self, module: nn.Module, examples: Sequence[Any], seed: int) -> tuple[str, ...]:  # noqa: ARG002
        """Fit what can be fitted in closed form before tuning, in place; what was done, as sentences."""
        return ()

    def encode(self, records: Sequence[Record], *, training: bool) -> Sequence[Any]:  # noqa: ARG002
        """Read every row.

        Raises:
            DataError: With every row that `example` refused.
        """
        found: list[Placed[Content]] = []
        refusals = Refusals()
        for record in records:
            row = getattr(record, "values", {})
            try:
                found.append(Placed(record.where, row, self.example(row)))
            except KeyError as error:
                refusals.add("lack a column", _missing(record.where, row, error))
            except Exception as error:  # noqa: BLE001 - the user's own code may raise anything
                fault = Fault(record.where, _said(error), "correct the row, or leave it out")
                refusals.add("cannot be read", fault)
        refusals.refuse(len(records))
        return found

    def size(self, example: Any) -> int:  # noqa: ARG002
        """What an example costs, in the unit of `train.micro_batch_tokens`."""
        return 1

    def collate(self, examples: Sequence[Any]) -> Batch:
        """The network's arguments and the targets in one batch."""
        inputs, target_BP = self.batch([example.content for example in examples])
        return {**inputs, TARGET: target_BP if target_BP.ndim == 2 else target_BP[:, None]}

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Squared error over measured values."""
        error_BP = predicted(model, batch) - torch.nan_to_num(batch[TARGET])
        return over_measured(error_BP.square(), batch[TARGET])

    def show(self, example: Any) -> Shown:
        """The targets as what is learnt."""
        target_P = self.collate([example])[TARGET][0].tolist()
        told = first_few([f"{name} {value:.3g}" for name, value in zip(self.names, target_P, strict=True)], 12)
        row = ", ".join(f"{name}: {value}" for name, value in example.row.items() if name not in self.names)
        return Shown(example.where, ((f"{row[:SHOWN_CHARACTERS]} -> ", False), (told, True)))


def _missing(where: str, row: Mapping[str, Any], error: KeyError) -> Fault:
    """A column that the row lacks, or a key that something of the user's own lacks."""
    if error.args and error.args[0] in row:
        return Fault(where, _said(error), "correct the row, or leave it out")
    return Fault(where, f"has no column {error}", f"columns here: {', '.join(row)}")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def predicted(model: nn.Module, batch: Batch) -> Tensor:
    """The network's answer to a batch in float32, shape (B, P).

    Raises:
        ModelError: If it is no tensor of that shape: what does not fit must not be stretched until it does.
    """
    raw: Any = model(**{name: value for name, value in batch.items() if name != TARGET})
    wanted = tuple(batch[TARGET].shape)
    if not isinstance(raw, Tensor) or not raw.is_floating_point():
        what = f"dtype {raw.dtype}" if isinstance(raw, Tensor) else f"a {type(raw).__name__}"
        raise ModelError(f"the network answers with {what}", where="model", hint=f"return a float tensor {wanted}")
    if tuple(raw.shape) not in {wanted, wanted[:1] if wanted[1] == 1 else wanted}:
        what = f"the network answers with the shape {tuple(raw.shape)}"
        raise ModelError(what, where="model", hint=f"return (rows, targets), here {wanted}")
    return raw.float().reshape(wanted)


def over_measured(total_BP: Tensor, target_BP: Tensor) -> Loss:
    """Sums over what was measured of each row."""
    measured_BP = ~target_BP.isnan()
    return Loss((total_BP * measured_BP).sum(dim=1), measured_BP.sum(dim=1).float())


@torch.inference_mode()
def predict(task: ValueTask[Any], model: nn.Module, examples: Sequence[Any], *, batch_rows: int = 1024) -> Values:
    """The network's answers, shape (N, P), in order; how many rows are answered at once changes nothing."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    found = []
    try:
        for begin, end in cuts(task, examples, batch_rows):
            batch = to_device(task.collate([examples[i] for i in range(begin, end)]), device)
            found.append(predicted(model, batch).double().cpu().numpy())
    finally:
        model.train(was_training)
    return np.concatenate(found) if found else np.empty((0, len(task.names)))


def targets(task: ValueTask[Any], examples: Sequence[Any], *, batch_rows: int = 4096) -> Values:
    """What was measured, shape (N, P), NaN where nothing was."""
    found = [
        task.collate([examples[i] for i in range(begin, min(begin + batch_rows, len(examples)))])[TARGET].numpy()
        for begin in range(0, len(examples), batch_rows)
    ]
    return np.concatenate(found).astype(np.float64)


def cuts(task: ValueTask[Any], examples: Sequence[Any], batch_rows: int) -> list[tuple[int, int]]:
    """Ranges of examples in order, at most `batch_rows` long and at most MOST_COST in cost, but always one."""
    found, begin, cost = [], 0, 0
    for place in range(len(examples)):
        size = task.size(examples[place])
        if place > begin and (place - begin >= batch_rows or cost + size > MOST_COST):
            found.append((begin, place))
            begin, cost = place, 0
        cost += size
    return [*found, (begin, len(examples))] if len(examples) else []
