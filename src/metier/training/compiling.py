"""The blocks of a network compiled, each by itself, so that equal blocks are compiled once.

What is compiled is the network as it is: our own modules do by hand what a compiler does by itself, and attention over
packs, whose work depends on what a pack holds, is passed over.
"""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from metier.core import RecipeError
from metier.core.files import cache_root
from metier.models.lean import has_triton, uncompiled
from metier.models.structure import blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import nn

CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""The environment's word for where torch's compiler keeps what it made."""


def check_compiler(device: torch.device) -> None:
    """Refuse before the work starts what cannot be compiled here.

    Raises:
        RecipeError: If there is no compiler for the device.
    """
    hint = "set train.compile to false"
    if device.type == "cuda":
        missing = None if has_triton() else "triton, which is not installed"
        hint = "pip install triton, or " + hint
    elif device.type == "cpu":
        name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        missing = None if shutil.which(name) else f"a C++ compiler, and {name} is not there"
        hint = "install one (g++), name yours in CXX, or " + hint
    else:
        missing = f"a device that it knows, and {device.type} is none"
    if missing:
        raise RecipeError(f"compiling needs {missing}", where="train.compile", hint=hint)


@contextmanager
def compiled(module: nn.Module) -> Iterator[int]:
    """Compile each block when it is first used, for as long as the `with` runs; answers how many there are.

    What torch cannot compile runs as it is, with a warning of torch's own.

    Args:
        module: The network, bare or with an adapter around it.
    """
    from torch._dynamo import config

    found: list[Any] = list(blocks(module) or ())
    with _kept_artefacts(), uncompiled(), config.patch(suppress_errors=True):
        for block in found:
            block.compile(dynamic=True)
        try:
            yield len(found)
        finally:
            for block in found:
                block._compiled_call_impl = None  # noqa: SLF001 - there is no other way back


@contextmanager
def _kept_artefacts() -> Iterator[None]:
    """Let the compiler keep what it makes in our cache, unless the user has named another place."""
    if CACHE in os.environ:
        yield
        return
    os.environ[CACHE] = str(cache_root() / "compiled")
    try:
        yield
    finally:
        os.environ.pop(CACHE, None)
