"""Attention whose queries and keys are turned to their positions in one pass over memory.

Shapes: B rows, T tokens, H heads, K key heads, D width of a head, E hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metier.models.lean.attention import NAME, overheard
from metier.models.lean.pointwise import has_kernels
from metier.models.lean.swap import agree

LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj"}
NORMS = {"q_norm", "k_norm"}
LARGE = 100.0
"""Far beyond what a layer's norm lets through. Judgement."""


class RotaryAttention(nn.Module):
    """Attention with rotary positions, as Llama's family writes it. Source: Su et al. 2021, arXiv:2104.09864.

    It stands for the layer while packs are read; asked for anything else, such as a cache or a turn of half a head,
    that one answers.

    Attributes:
        asks: What the layer asks of its attention function: the factor of the scores, a window, and the like.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module

    def __init__(self, plain: nn.Module) -> None:
        """Take over the layers of the module that this one stands for, under their names."""
        super().__init__()
        for name, child in plain.named_children():
            self.add_module(name, child)
        self._plain = (plain,)  # in a tuple, so that its parameters are not counted twice
        self.asks: dict[str, Any] = {}

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **more: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's answer, shape (B, T, E), and the shares of attention where the function gives them."""
        (plain,) = self._plain
        plain.training = self.training  # nobody else tells it
        known: Any = plain
        # A family may turn a part of each head alone; the angles tell.
        if (
            past_key_values is not None
            or position_embeddings is None
            or position_embeddings[0].shape[-1] != known.head_dim
            or not reads_packs(known)
        ):
            answer: tuple[Tensor, Tensor | None] = plain(
                hidden_states=hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask,
                past_key_values=past_key_values, **more,
            )  # fmt: skip
            return answer
        from transformers import AttentionInterface

        shape = (*hidden_states.shape[:-1], -1, known.head_dim)
        q_BTHD, k_BTKD, v_BTKD = (layer(hidden_states).view(shape) for layer in (self.q_proj, self.k_proj, self.v_proj))
        if "q_norm" in self._modules:
            q_BTHD, k_BTKD = self.q_norm(q_BTHD), self.k_norm(k_BTKD)
        q_BTHD, k_BTKD = turned(q_BTHD, k_BTKD, *position_embeddings)
        mixed, shares = AttentionInterface()[NAME](
            plain, *(x.transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD)), attention_mask,
            dropout=known.attention_dropout if self.training else 0.0, **{**more, **self.asks},
        )  # fmt: skip
        return self.o_proj(mixed.reshape(*shape[:-2], -1)), shares


def rotary(module: Any) -> nn.Module | None:
    """What stands for a module; None where it is no such attention, or answers otherwise on random states."""
    names = {name for name, _ in module.named_children()}
    if not names >= LAYERS or names - LAYERS not in (set(), NORMS) or not reads_packs(module):
        return None
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    if own or not hasattr(module, "head_dim") or not hasattr(module, "attention_dropout"):
        return None
    made = RotaryAttention(module)
    weight, chance = next(module.parameters()), torch.Generator().manual_seed(0)
    angles = torch.randn(1, 3, module.head_dim // 2, generator=chance).repeat(1, 1, 2).to(weight.device)
    given = {"position_embeddings": tuple(x.to(weight.dtype) for x in (angles.cos(), angles.sin()))}
    with overheard() as made.asks:
        # Large states as well: there are families that clip queries, keys and values.
        fits = all(agree(module, made, size=size, attention_mask=None, **given) for size in (1.0, LARGE))
    return made if fits else None


def reads_packs(module: Any) -> bool:
    """Whether an attention layer's network goes through our function."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None) == NAME


def turned(q_BTHD: Tensor, k_BTKD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys turned to their positions: x * cos + (-x2, x1) * sin for the halves (x1, x2) of a head."""
    both: tuple[Tensor, Tensor] = _Turned.apply(q_BTHD, k_BTKD, cos_BTD, sin_BTD)  # type: ignore[no-untyped-call]
    return both


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _both(query, key, cos, sin, back=False)

    @staticmethod
    def backward(ctx: Any, of_query: Tensor, of_key: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        return *_both(of_query, of_key, *ctx.saved_tensors, back=True), None, None


def _both(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> tuple[Tensor, Tensor]:
    if has_kernels(query):
        from metier.models.lean import kernels

        return kernels.turned(query, key, cos, sin, back=back)
    return _turn(query, cos, sin, back=back), _turn(key, cos, sin, back=back)


def _turn(x_BTHD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor, *, back: bool) -> Tensor:
    cos, sin = (x[:, :, None].to(x_BTHD.dtype) for x in (cos_BTD, sin_BTD))
    (low, high), (sin_low, sin_high) = x_BTHD.chunk(2, -1), sin.chunk(2, -1)
    out = x_BTHD * cos
    out_low, out_high = out.chunk(2, -1)
    # The slope goes back through the transposed turn.
    first, second = (sin_high, -sin_low) if back else (-sin_low, sin_high)
    out_low.addcmul_(high, first)
    out_high.addcmul_(low, second)
    return out
