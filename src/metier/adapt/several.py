"""Several saved adapters on one base: switched without loading the base again, or made into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from metier.adapt.lora import load_adapter
from metier.models.silence import quiet

if TYPE_CHECKING:
    from torch import nn

Blend = Literal["linear", "ties", "dare"]
"""How adapters are made into one: mean of the factors, or of the largest numbers that agree in sign (TIES), or of
numbers drawn by chance and scaled up for those that were not (DARE, with the same election of signs)."""
DENSITY = 0.5
"""Share of the numbers that TIES and DARE keep. Source: peft's documentation of merging, which uses 0.2 to 0.7."""
PEFT_WORDS = {"linear": "linear", "ties": "ties", "dare": "dare_ties"}


def load_adapters(module: nn.Module, folders: Mapping[str, Path]) -> nn.Module:
    """Wrap the base with several saved adapters, for inference; the first one is in use.

    Raises:
        ModelError: If an adapter does not fit the base, or cannot be read.
    """
    first, *others = folders
    wrapped: Any = load_adapter(module, folders[first], name=first)
    with quiet():
        for name in others:
            wrapped.load_adapter(str(folders[name]), adapter_name=name)
    return wrapped.eval()  # type: ignore[no-any-return]


def switch(module: nn.Module, name: str) -> None:
    """Put another adapter to use."""
    wrapped: Any = module
    wrapped.set_adapter(name)
    wrapped.requires_grad_(requires_grad=False)


def blend(module: nn.Module, names: Sequence[str], how: Blend) -> str:
    """Make one adapter of several, each with the same weight, and put it to use; its name.

    Weights of the mean add up to one; TIES and DARE take the mean of what was elected themselves, so theirs are one.

    Source: Yadav et al. 2023, arXiv:2306.01708 (TIES); Yu et al. 2024, arXiv:2311.03099 (DARE).
    """
    wrapped: Any = module
    thinned = {} if how == "linear" else {"density": DENSITY}
    weight = 1 / len(names) if how == "linear" else 1.0
    wrapped.add_weighted_adapter(list(names), [weight] * len(names), how, combination_type=PEFT_WORDS[how], **thinned)
    switch(module, how)
    return how
