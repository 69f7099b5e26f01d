"""When and how a run is saved: taken between two steps, written beside the next ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from metier.core import DivergedError, StorageError, files
from metier.core.memory import free_memory_bytes
from metier.training import checkpoint
from metier.training.background import Background

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from metier.training.checkpoint import Contents, Origin, Progress

COPIES = 2
"""Free memory, in copies of what is saved, from which one is taken, to be written beside the training. Judgement."""


class Saver:
    """Saves one run; one save is in flight at most, and its errors come up at the next call."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        schedule: LRScheduler,
        origin: Origin,
        *,
        folder: Path,
        metrics: Path,
        keep: int,
        minutes: float,
    ) -> None:
        """Name what is saved, where, how many of it are kept, and how much time lies between."""
        self._module, self._optimizer, self._schedule, self._origin = module, optimizer, schedule, origin
        self.folder, self._metrics, self._keep, self._minutes = folder, metrics, keep, minutes
        self._background = Background()
        self._saved_at = time.monotonic()
        self._last: Progress | None = None

    def restore(self) -> Progress | None:
        """Remove what killed saves left, and go back to the newest checkpoint; None where there is none.

        Raises:
            RecipeError: If it is of another origin.
            StorageError: If the disk has too little space for those to come.
        """
        files.clean(self.folder)
        self._last = checkpoint.load_newest(self.folder, self._module, self._optimizer, self._schedule, self._origin)
        self._check_space(1 if self._last else self._keep + 1, 1 if self._last else 2)
        return self._last

    def save_if_due(self, progress: Progress) -> None:
        """Begin to save when the last time is long enough ago.

        Raises:
            StorageError: If the save before failed.
        """
        self._background.check()
        if time.monotonic() - self._saved_at > self._minutes * 60:
            self._begin(progress)

    def save(self, progress: Progress) -> None:
        """Save, unless this is saved already; it is durable when this returns.

        Raises:
            StorageError: If the disk is full; what was saved before is intact.
        """
        if progress != self._last:
            self._begin(progress)
        self._background.wait()

    def save_best(self, step: int) -> None:
        """Begin to save the weights as the best so far.

        Raises:
            StorageError: If the save before failed.
        """
        self._check_sound(step)
        self._do(
            partial(checkpoint.take_weights, self._module),
            partial(checkpoint.commit_best, self.folder, step),
            checkpoint.weights_bytes(self._module),
        )

    def save_end(self, progress: Progress) -> None:
        """Say that no step is left to take; the best weights are saved already.

        Raises:
            StorageError: If the disk is full; what was saved before is intact.
        """
        self._background.wait()
        self._write(progress, checkpoint.take_end(self._schedule, progress, self._origin))

    def load_best(self, step: int) -> None:
        """Put the best weights back into the network.

        Raises:
            StorageError: If they are not what was written.
        """
        self._background.wait()
        checkpoint.load_best(self.folder, step, self._module)

    def close(self) -> None:
        """Wait for what is in flight.

        Raises:
            StorageError: If it fails.
        """
        self._background.wait()

    def stop(self) -> None:
        """End what is in flight where it stands: nobody waits any more."""
        self._background.stop()

    def _check_sound(self, step: int) -> None:
        """Refuse to save what is no number.

        Raises:
            DivergedError: If a weight or a moment of the optimizer is not finite.
        """
        if found := checkpoint.unsound(self._module, self._optimizer):
            raise DivergedError(
                f"{found} is not finite after step {step}",
                where="training, before saving; what was saved before is intact",
                hint="lower train.learning_rate to a third",
            )

    def _begin(self, progress: Progress) -> None:
        self._check_sound(progress.step)
        self._do(
            partial(checkpoint.take, self._module, self._optimizer, self._schedule, progress, self._origin),
            partial(self._write, progress),
            checkpoint.estimated_bytes(self._module),
        )
        self._last, self._saved_at = progress, time.monotonic()

    def _do(self, take: Callable[..., Contents], write: Callable[[Contents], None], size: int) -> None:
        self._background.wait()
        free = free_memory_bytes()
        if free is not None and free < COPIES * size:
            # A copy could cost the run its life: the steps wait for the disk instead.
            write(take(copied=False))
            return
        contents = {name: self._while_wanted(blocks) for name, blocks in take(copied=True).items()}
        self._background.start(partial(write, contents))

    def _write(self, progress: Progress, contents: Contents) -> None:
        # The lines of the steps that a checkpoint holds must not be lost where it is not.
        try:
            files.sync(self._metrics)
        except OSError as error:
            raise files.storage_error(self._metrics, error) from error
        checkpoint.commit(self.folder, progress, contents, keep=self._keep)

    def _while_wanted(self, blocks: Any) -> Iterator[files.Block]:
        for block in blocks:
            if self._background.stopped:
                raise InterruptedError("stopped")
            yield block

    def _check_space(self, checkpoints: int, bests: int) -> None:
        one, weights = checkpoint.estimated_bytes(self._module), checkpoint.weights_bytes(self._module)
        needed = checkpoints * one + bests * weights
        spare = checkpoint.spare_bytes(self.folder, needed)
        if spare < 0:
            raise StorageError(
                f"checkpoints of {one / 1e9:.1f} GB and best weights of {weights / 1e9:.1f} GB need "
                f"{needed / 1e9:.1f} GB, {-spare / 1e9:.1f} GB more than is free",
                where=str(self.folder),
                hint="free some space, name another folder with export.folder=..., or lower export.checkpoints",
            )
