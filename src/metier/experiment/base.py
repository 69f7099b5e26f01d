"""One base in memory for the whole experiment: whatever a training changed is put back before the next one begins.

A network beside the base (`adapt.beside`) would need no putting back, but a second copy of all that moves: the memory
of full fine-tuning would then not be what `metier train` takes.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from metier import models, training
from metier.core import files
from metier.models.structure import saved_buffers
from metier.recipe import LoRAMethod
from metier.run.job import Job, choose_device, make_ready

if TYPE_CHECKING:
    from torch import Tensor, nn

    from metier.adapt import Adapted
    from metier.models import Model

BASE = "base.safetensors"
"""The base as it was loaded, beside the trials, while methods run that change it in place."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A base made ready for one training.

    Attributes:
        adapted: The network and what moves.
        job: The job, its task laid out for this network.
        fitted: What was fitted in closed form before, as sentences.
    """

    adapted: Adapted
    job: Job
    fitted: tuple[str, ...]


class LoadedBase:
    """The base of a job, loaded once.

    Attributes:
        model: As loaded; between trainings its network has the base's own bits.
        precision: Number format and device, the same for every arm.
        file: Every tensor as it was loaded, on disk; None where no method changes the base in place.
    """

    def __init__(self, job: Job, folder: Path, *, whole: bool) -> None:
        """Load the base; with `whole`, all of it is kept on disk as well, for methods that change it in place."""
        device = choose_device(job.recipe)
        self.precision = training.choose(job.recipe.train, device)
        self.model: Model = job.load()
        self.precision.place(self.model.module)
        self._seed = job.recipe.train.seed
        self.file = folder / BASE if whole else None
        self._heads: dict[int, Mapping[str, Tensor]] = {self._seed: self._clones()}
        if self.file is not None:
            models.write_tensors(_tensors(self.model.module), self.file)

    @contextmanager
    def ready(self, job: Job) -> Iterator[Ready]:
        """The base made ready for the job's method and seed; afterwards it is the base again."""
        self._put(self._head(job))
        fitted = job.calibrate(self.model)
        made = make_ready(job, self.model, self.precision)
        gc.collect()  # what an earlier training left must not count as this one's memory
        try:
            yield Ready(made, replace(job, task=job.task.suited(made.module)), fitted)
        finally:
            self._restore(made.module, lora=isinstance(job.recipe.method, LoRAMethod))

    def close(self) -> None:
        """Remove what was kept on disk."""
        if self.file is not None:
            files.discard(self.file)

    def _clones(self) -> dict[str, Tensor]:
        """What may change even where the base stays: new and whole parameters, and running statistics."""
        module = self.model.module
        small: dict[str, Tensor] = {name: module.get_parameter(name) for name in (*self.model.new, *self.model.whole)}
        small |= saved_buffers(module)
        return {name: tensor.detach().clone() for name, tensor in small.items()}

    def _head(self, job: Job) -> Mapping[str, Tensor]:
        """The parameters that no checkpoint holds, drawn by the job's own seed, and the base's small tensors."""
        seed = job.recipe.train.seed
        if seed not in self._heads:
            drawn = job.redrawn(self.model) if self.model.new else {}
            self._heads[seed] = {**self._heads[self._seed], **drawn}
        return self._heads[seed]

    def _restore(self, wrapped: nn.Module, *, lora: bool) -> None:
        from safetensors.torch import load_file

        wrapped.zero_grad(set_to_none=True)  # or the next training would stand beside this one's gradients
        if lora:
            unwrapped: Any = wrapped
            unwrapped.unload()
        elif self.file is not None:
            self._put(load_file(self.file))
        self._put(self._heads[self._seed])

    @torch.no_grad()
    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        own = _tensors(self.model.module)
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter once, and the buffers that are saved."""
    own = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return own | saved_buffers(module)
