"""Activations computed again in the backward pass instead of kept: the same gradient in much less memory.

Source: Chen et al. 2016, arXiv:1604.06174.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from metier.models.structure import wrapped_base

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn


@contextmanager
def recomputing(module: nn.Module, *, wanted: bool) -> Iterator[bool]:
    """Keep only what goes into each block while the `with` runs; answers whether the network can.

    Args:
        module: The network, bare or with an adapter around it.
        wanted: Whether to do so at all.
    """
    network: Any = wrapped_base(module)
    if not (wanted and getattr(network, "supports_gradient_checkpointing", False)):
        yield False
        return
    # Transformers renamed the switch within version 5.
    word = "activation" if hasattr(network, "activation_checkpointing_enable") else "gradient"
    # The other kind of checkpoint needs an input that requires a gradient, and frozen embeddings give none.
    getattr(network, f"{word}_checkpointing_enable")(**{f"{word}_checkpointing_kwargs": {"use_reentrant": False}})
    try:
        yield True
    finally:
        getattr(network, f"{word}_checkpointing_disable")()
