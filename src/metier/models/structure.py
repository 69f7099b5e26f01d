"""Where the head, the blocks and the linear layers of a network stand, found by looking, not by family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


def head_names(module: nn.Module) -> tuple[str, ...]:
    """Direct children of the network that are not its trunk: `lm_head`, `classifier`, `score` ...

    A network without a declared trunk (a plain module) has no head in this sense.
    """
    trunk = getattr(module, "base_model_prefix", "")
    if not trunk or not hasattr(module, trunk):
        # A network that is its own trunk, such as T5, still names its output layer.
        output = output_layer(module)
        return tuple(name for name, child in module.named_children() if child is output)
    return tuple(
        name for name, child in module.named_children() if name != trunk and any(True for _ in child.parameters())
    )


def output_layer(module: nn.Module) -> nn.Module | None:
    """The layer that puts out token scores, for language models."""
    get = getattr(module, "get_output_embeddings", None)
    found = get() if callable(get) else None
    return found if isinstance(found, nn.Module) else None


def wrapped_base(module: nn.Module) -> nn.Module:
    """The network inside an adapter's wrapper, or the network itself."""
    get = getattr(module, "get_base_model", None)
    return get() if callable(get) else module


def is_tied(module: nn.Module) -> bool:
    """Whether the output layer shares its weight with the input embedding."""
    output = output_layer(module)
    get = getattr(module, "get_input_embeddings", None)
    embedding = get() if callable(get) else None
    return output is not None and embedding is not None and output.weight is embedding.weight


def blocks(module: nn.Module) -> nn.ModuleList | None:
    """The last and longest list of equal blocks: the decoder's where there are an encoder and a decoder."""
    found: nn.ModuleList | None = None
    for child in module.modules():
        is_stack = isinstance(child, nn.ModuleList) and len(child) > 0 and len({type(block) for block in child}) == 1
        if isinstance(child, nn.ModuleList) and is_stack and (found is None or len(child) >= len(found)):
            found = child
    return found


def saved_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that a state dict holds, such as running statistics, by full name."""
    kept = set(module.state_dict(keep_vars=True))
    return {name: buffer for name, buffer in module.named_buffers() if name in kept}


def linears(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every linear layer by full name, GPT-2's transposed one (Conv1D) among them, the head not."""
    from transformers.pytorch_utils import Conv1D

    heads = head_names(module)
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear | Conv1D) and name.split(".")[0] not in heads:
            yield name, child
