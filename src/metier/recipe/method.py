"""`method:` -- which parameters move."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from metier.recipe.section import KindOrWord, Section


class FullMethod(Section):
    """Full fine-tuning: every parameter moves."""

    kind: Literal["full"] = "full"


class FreezeMethod(Section):
    """The last blocks and the head move, everything below stays."""

    kind: Literal["freeze"] = "freeze"
    blocks: int = Field(default=2, ge=0)
    """How many of the last blocks move; 0 moves the head alone."""


class LoRAMethod(Section):
    """Low-rank adaptation: the weights stay, a rank-`rank` update moves. Source: Hu et al. 2021, arXiv:2106.09685."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(default=16, ge=1, le=4096)
    """Rank of the update; parameters grow linearly with it."""
    alpha: float = Field(default=32.0, gt=0)
    """The update is scaled by alpha / rank. Constant over ranks, the best learning rate hardly moves with the rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the input of the update, in training only."""
    targets: Literal["auto"] | tuple[str, ...] = "auto"
    """Layers to adapt by the end of their name, such as [q_proj, v_proj]; "auto" takes every linear layer but the head."""
    variant: Literal["lora", "rslora", "dora"] = "lora"
    """rsLoRA scales by alpha / sqrt(rank) (arXiv:2312.03732); DoRA also learns the size of each weight column (arXiv:2402.09353)."""


MethodSection = Annotated[
    Annotated[FullMethod | FreezeMethod | LoRAMethod, Field(discriminator="kind")],
    KindOrWord(usual="lora"),
]
