"""Which method to take, by rules that say their reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from metier.planning.rates import SMALL

if TYPE_CHECKING:
    from metier.models.model import Head
    from metier.models.shape import Shape

Kind = Literal["full", "lora", "freeze", "qlora"]

CAPACITY_RANK = 256
"""Highest rank that is worth taking: data beyond its capacity want full fine-tuning. Judgement."""
FEW_ROWS = 1_000
"""Below so many rows a small model is safer with an adapter. Judgement."""
MANY_ROWS = 5_000
"""From so many rows on a small model is better off with full fine-tuning. Judgement."""


@dataclass(frozen=True, slots=True)
class Case:
    """What the rules look at.

    Attributes:
        rows: Training rows.
        learnt_tokens: Supervised tokens in one pass.
        raw_text: Whether all of every row is learnt, as in continued pretraining.
        head: What the network puts out.
        fits: Whether each method fits in memory; None where nobody knows.
        full_is_easy: Whether full fine-tuning takes at most 0.8 of the memory.
    """

    rows: int
    learnt_tokens: int
    raw_text: bool
    head: Head
    fits: Mapping[Kind, bool | None]
    full_is_easy: bool


def advise(shape: Shape, case: Case) -> tuple[Kind | None, str]:
    """The method to take, None where none fits, and why.

    Source: adapters learn as well as full fine-tuning while the learnt tokens stay below their parameters (LoRA primer
    in the documentation of tinker-cookbook); continued pretraining exceeds them (arXiv:2405.09673). The limits on rows
    are judgement, to be replaced by a comparison on the user's own data.
    """
    if shape.parameters <= SMALL and case.full_is_easy and not case.raw_text:
        return _small(shape, case)
    capacity = CAPACITY_RANK * sum(layer.inputs + layer.outputs for layer in shape.linears)
    learnt = f"{case.learnt_tokens:,} tokens"
    if case.learnt_tokens > capacity:
        return _wants_full(case, f"one pass learns {learnt}, more than a rank-{CAPACITY_RANK} adapter has numbers")
    if case.raw_text:
        return _wants_full(case, "continued pretraining on plain text gains more from full fine-tuning")
    return _wants_adapter(case, f"one pass learns {learnt}, within what an adapter can hold ({capacity:,})")


def _small(shape: Shape, case: Case) -> tuple[Kind | None, str]:
    both = (
        f"With {shape.parameters / 1e6:,.0f} M parameters full fine-tuning and LoRA are both cheap here: run both and "
        "compare them on your validation rows."
    )
    if case.rows < FEW_ROWS:
        return "lora", f"{both} If it must be one: LoRA, because {case.rows:,} rows are few (judgement)."
    if case.rows >= MANY_ROWS:
        return "full", f"{both} If it must be one: full fine-tuning, because {case.rows:,} rows are plenty (judgement)."
    return "lora", f"{both} With {case.rows:,} rows neither is the safer guess; LoRA is the one that is easier to keep."


def _wants_full(case: Case, why: str) -> tuple[Kind | None, str]:
    if case.fits["full"] is not False:
        return "full", f"Full fine-tuning: {why}."
    kind, _ = _wants_adapter(case, why)
    if kind is None:
        return _nothing_fits()
    name = {"lora": "LoRA", "qlora": "QLoRA"}.get(kind, kind)
    return kind, (
        f"Full fine-tuning would be right ({why}), but it does not fit in memory. "
        f"Next best: {name} with rank 128 or more on every linear layer."
    )


def _wants_adapter(case: Case, why: str) -> tuple[Kind | None, str]:
    if case.fits["lora"] is not False:
        return "lora", f"LoRA: {why}, at a fraction of the memory and disk of full fine-tuning."
    if case.fits.get("qlora") is True:
        return (
            "qlora",
            f"QLoRA: {why}, and only a 4-bit base fits; it costs a little quality and 1.2 to 2 times the time.",
        )
    return _nothing_fits()


def _nothing_fits() -> tuple[None, str]:
    return None, (
        "No method fits in memory: take a smaller model, lower train.micro_batch_tokens, or shorten the rows with "
        "task.max_tokens."
    )
