"""The rows of a step that went wrong: kept for whoever looks for the reason, and what to type next."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from metier.core import DivergedError
from metier.core.files import write_text
from metier.core.log import warn
from metier.tasks import score

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import nn

    from metier.core import StepRecord
    from metier.tasks import Task
    from metier.training.batches import Step

MOST_KEPT = 3
"""Steps with unusual rows that are kept; more would tell nothing new."""
MOST_CHARACTERS = 4000
"""Of a row's text as much is kept as anybody reads."""
GENTLER = 3.0
"""By what a rate that diverged is divided: one step of a search in half decades. In the sweep that the rates of
planning come from, most LoRA runs at 3e-3 diverged and the best stood near 3e-4, so one or two such steps lie between.
Source: the documentation of tinker-cookbook."""


class Suspects:
    """Knows which step is under way, and keeps its rows where it goes wrong."""

    def __init__(
        self,
        module: nn.Module,
        task: Task[Any],
        examples: Sequence[Any],
        folder: Path,
        checkpoints: Path,
        *,
        learning_rate: float,
        total: int,
    ) -> None:
        """Begin before the first step.

        Args:
            module: The network.
            task: What is learnt.
            examples: The training examples.
            folder: Where rows are kept, a file for each step.
            checkpoints: Where the run saves, for the message.
            learning_rate: Peak rate.
            total: Steps of the run.
        """
        self._module, self._task, self._examples = module, task, examples
        self._folder, self._checkpoints = folder, checkpoints
        self._learning_rate, self._total = learning_rate, total
        self._step: Step | None = None
        self._noted = 0

    def begin(self, step: Step) -> None:
        """Know the step that is taken from now on."""
        self._step = step

    def note(self, record: StepRecord) -> None:
        """Keep the rows of a step whose loss was a spike though the weights are sound; the first few such steps."""
        self._noted += 1
        if self._noted <= MOST_KEPT and self._step is not None:
            path, _ = self._keep(self._step)
            warn(
                f"step {record.step}: loss {record.loss:.4g} is far above the others though the weights are sound, "
                f"so its rows are unlike the others: {path}"
            )

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Say of a divergence in which step it came and what to type next, and keep the rows of the step."""
        try:
            yield
        except DivergedError as error:
            if self._step is None:
                raise
            raise self._told(error, self._step) from error

    def _told(self, error: DivergedError, step: Step) -> DivergedError:
        fault = error.faults[0]
        path, broken = self._keep(step)
        what = f"{fault.what}; step {step.number} of {self._total}, peak rate {self._learning_rate:g}, rows in {path}"
        gentler = f"train.learning_rate={self._learning_rate / GENTLER:.2g}"
        if 0 < len(broken) < len(step.rows):
            what += f", where {', '.join(broken[:5])} have no finite loss"
            hint = "look at these rows first"
        elif step.number == 1:
            hint = f"no weight has moved yet: look at the rows and at the base before you try {gentler}"
        else:
            hint = f"begin anew with {gentler}, a third, and another export.folder"
        return DivergedError(what, where=fault.where, hint=f"{hint}; {self._saved()}")

    def _keep(self, step: Step) -> tuple[Path, list[str]]:
        path = self._folder / f"step-{step.number:08d}.jsonl"
        return path, keep(path, self._module, self._task, self._examples, step.rows)

    def _saved(self) -> str:
        """What a divergence has left as it was."""
        steps = [int(path.name.split("-")[1]) for path in self._checkpoints.glob("step-*")]
        names = [f"the checkpoint of step {max(steps)}"] if steps else []
        names += ["the best weights"] if any(self._checkpoints.glob("best-*")) else []
        return f"{' and '.join(names)} stay in {self._checkpoints}" if names else "nothing had been saved"


def keep(path: Path, module: nn.Module, task: Task[Any], examples: Sequence[Any], rows: Sequence[int]) -> list[str]:
    """Write one JSON object for each row of a step, the worst first: place, number, loss and text.

    Args:
        path: The file.
        module: The network as it is now.
        task: What is learnt.
        examples: The training examples.
        rows: Which of them met in the step.

    Returns:
        Places of the rows whose loss is no number.

    Raises:
        StorageError: If the disk is full.
    """
    losses = {row: _loss(module, task, examples[row]) for row in rows}
    worst = sorted(rows, key=lambda row: losses[row] if math.isfinite(losses[row]) else math.inf, reverse=True)
    shown = {row: task.show(examples[row]) for row in rows}
    lines = [
        {
            "where": shown[row].where,
            "row": row,
            # JSON knows neither NaN nor infinity; null says that there was no number.
            "loss": losses[row] if math.isfinite(losses[row]) else None,
            "text": "".join(part for part, _ in shown[row].parts)[:MOST_CHARACTERS],
        }
        for row in worst
    ]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return [shown[row].where for row in worst if not math.isfinite(losses[row])]


def _loss(module: nn.Module, task: Task[Any], example: Any) -> float:
    """Mean loss of one example by itself: where one is not finite, its neighbours in a pack would not be either."""
    loss = score(task, module, [example])
    return float(loss.total_B.sum()) / max(1.0, float(loss.weight_B.sum()))
