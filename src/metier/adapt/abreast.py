"""Several adapters on one base: each in a network of its own that shares the base's tensors, or all in one pass.

In one pass the adapters' inputs stand one after the other in one sequence. The frozen layers meet all of it at once,
and each update meets its own part.

Source: Ye et al. 2023, arXiv:2312.02515.

Shapes: T tokens of a pass, B rows of it, H width.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from metier.adapt.lean import Update, is_plain, updated
from metier.models.lean import Pointwise, Store, remembered, swapped
from metier.models.structure import wrapped_base

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


def twin(module: nn.Module) -> nn.Module:
    """A network of its own with the same weights: parameters are new objects over the same memory, buffers copies."""
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, shared)


def own_what_moves(module: nn.Module, base: nn.Module) -> None:
    """Give what moves memory of its own where it still is the base's."""
    shared = {p.data_ptr() for p in base.parameters()}
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.data_ptr() in shared:
            parameter.data = parameter.data.clone()


def why_apart(modules: Sequence[nn.Module]) -> str:
    """Why these adapters cannot meet one pass; empty where they can.

    Args:
        modules: Networks with adapters, as `beside` makes them.
    """
    for module in modules:
        for path, layer in _places(module).items():
            if hasattr(layer, "lora_A") and not is_plain(layer):
                return f"{path} has more than a plain low-rank update on a linear layer (dropout, DoRA, another layer)"
    return ""


@contextmanager
def in_one_pass(
    base: nn.Module, modules: Sequence[nn.Module], store: Store | None = None
) -> Iterator[tuple[nn.Module, Lanes]]:
    """A network in which every adapter is at work, each on its own part of the input, while the block runs.

    Parameters are the adapters' own, so that their gradients arrive where their optimizers look.

    Args:
        base: The network below all of them; it is left as it is.
        modules: Networks with adapters on it, for which `why_apart` has no reason.
        store: Where states below everything that moves are kept.

    Yields:
        The network, and what tells it whose part is where.
    """
    lanes, network = Lanes(), twin(base).requires_grad_(requires_grad=False)
    found: dict[str, dict[int, Any]] = {}
    for number, module in enumerate(modules):
        for path, layer in _places(module).items():
            found.setdefault(path, {})[number] = layer
    for path, layers in found.items():
        holder, _, name = path.rpartition(".")
        plain: Any = network.get_submodule(path)
        kind = Updates if hasattr(next(iter(layers.values())), "lora_A") else Wholes
        setattr(network.get_submodule(holder), name, kind(plain, layers, lanes))
    with remembered(network, store), swapped(network, (Pointwise(),)):
        yield network, lanes


def _places(module: nn.Module) -> dict[str, Any]:
    """Where an adapter's layers stand in the base, by path: low-rank updates, and modules that move whole."""
    from peft.utils import ModulesToSaveWrapper

    return {
        path: layer
        for path, layer in wrapped_base(module).named_modules()
        if hasattr(layer, "lora_A") or isinstance(layer, ModulesToSaveWrapper)
    }


class Part(NamedTuple):
    """A stretch of a pass, and the number of the adapter that it belongs to."""

    adapter: int
    start: int
    end: int


class Lanes:
    """Whose part of a pass is where."""

    def __init__(self) -> None:
        """Nothing is laid yet: the base answers alone."""
        self._parts: dict[int, tuple[Part, ...]] = {}

    @contextmanager
    def laid(self, adapters: Sequence[int], *sizes: Sequence[int]) -> Iterator[None]:
        """Tell whose parts the pass has, while the block runs; its backward pass belongs in there.

        Args:
            adapters: The adapter of each part, in the order in which they stand.
            sizes: For every way in which places are counted (tokens, rows) how many each part has.
        """
        self._parts = {sum(counts): _parts(adapters, counts) for counts in sizes}
        try:
            yield
        finally:
            self._parts = {}

    def of(self, places: int) -> tuple[Part, ...]:
        """The parts of a layer's input of so many places; none where nothing is laid.

        Raises:
            NotImplementedError: If the network counts in another way, such as by expert.
        """
        if not self._parts:
            return ()
        if places not in self._parts:
            raise NotImplementedError(f"a layer that is given {places} places, and a pass has {list(self._parts)}")
        return self._parts[places]


def _parts(adapters: Sequence[int], counts: Sequence[int]) -> tuple[Part, ...]:
    parts, start = [], 0
    for adapter, count in zip(adapters, counts, strict=True):
        parts.append(Part(adapter, start, start + count))
        start += count
    return tuple(parts)


class Updates(nn.Module):
    """A frozen linear layer and the low-rank updates of several adapters, each for its own part."""

    def __init__(self, base: nn.Linear, layers: Mapping[int, Any], lanes: Lanes) -> None:
        """Take over the layers that peft made, by the number of their adapter."""
        super().__init__()
        self.base_layer, self._lanes = base, lanes
        self._scaling: dict[int, float] = {}
        for number, layer in layers.items():
            (name,) = layer.lora_A.keys()
            self._scaling[number] = float(layer.scaling[name])
            self.add_module(f"down_{number}", layer.lora_A[name])
            self.add_module(f"up_{number}", layer.lora_B[name])

    @property
    def weight(self) -> Tensor:
        """The frozen weight, for networks that ask a layer for its number format."""
        return self.base_layer.weight

    def forward(self, given: Tensor) -> Tensor:
        """The layer's answer."""
        parts = self._lanes.of(given.shape[:-1].numel())
        return updated(self.base_layer, given, [self._update(part) for part in parts if part.adapter in self._scaling])

    def _update(self, part: Part) -> Update:
        down, up = (self.get_parameter(f"{which}_{part.adapter}.weight") for which in ("down", "up"))
        return Update(part.start, part.end, self._scaling[part.adapter], down, up)


class Wholes(nn.Module):
    """A module of which every adapter has one of its own, such as a classification head."""

    def __init__(self, base: nn.Module, layers: Mapping[int, Any], lanes: Lanes) -> None:
        """Take over the modules that peft saves with each adapter, by the adapter's number."""
        super().__init__()
        self.base_layer, self._lanes = base, lanes
        self._numbers = tuple(layers)
        for number, layer in layers.items():
            (name,) = layer.modules_to_save.keys()
            self.add_module(f"whole_{number}", layer.modules_to_save[name])

    def forward(self, given: Tensor) -> Tensor:
        """What each module says of its part, shape (B, ...) or (1, T, ...) as it came."""
        along = 1 if given.shape[0] == 1 else 0
        parts = self._lanes.of(given.shape[along])
        if not parts:
            answer: Tensor = self.base_layer(given)
            return answer
        return torch.cat(
            [self._whole(part.adapter)(given.narrow(along, part.start, part.end - part.start)) for part in parts], along
        )

    def _whole(self, number: int) -> nn.Module:
        return self.get_submodule(f"whole_{number}") if number in self._numbers else self.base_layer
