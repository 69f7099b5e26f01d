"""How fast to learn when the user does not say: decision rules, each with its reason.

They are first guesses. A wrong rate costs more than a wrong method, so a search around the guess is always worth it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from metier.recipe import FreezeMethod, FullMethod, LoRAMethod

if TYPE_CHECKING:
    from metier.models.model import Head
    from metier.recipe import MethodSection

FEW_STEPS = 100
"""Fewer optimizer steps than this are too few for an adapter at the usual rate. Judgement."""
FEW_STEPS_FACTOR = 1.5
"""What an adapter's rate is then multiplied by. Judgement; 40 steps with SmolLM2-135M learnt little at 3e-4."""
SMALL = 300_000_000
"""Parameters up to which a model counts as small: it takes higher rates, and every method is cheap enough to try."""
SMALL_ENCODER = 60_000_000
"""Parameters below which an encoder counts as small."""
LORA_CAP = 2e-3
"""Most for an adapter on a language model; at 3e-3 most runs of the public rank sweep diverged. Source: Tulu 3 sweep in
the documentation of tinker-cookbook."""
LORA_ENCODER_CAP = 3e-3
"""Most for an adapter on an encoder. Judgement."""
FULL_CAP, FULL_ENCODER_CAP = 1e-4, 3e-4
"""Most for a whole language model and a whole encoder that are not small. Judgement."""
BLOCKS_FACTOR = 3.0
"""The last blocks alone take a higher rate than the whole network, because less moves. Judgement."""


class Choice(NamedTuple):
    """A chosen value and the sentence that says why."""

    value: float
    reason: str


def learning_rate(
    method: MethodSection, *, head: Head, parameters: int, steps: int, task_kind: str, scratch: bool = False
) -> Choice:
    """Peak rate for AdamW with warm-up and decay.

    Args:
        method: Which parameters move.
        head: What the network puts out.
        parameters: Numbers in the model.
        steps: Optimizer steps of the run.
        task_kind: The recipe's word for the task, for the sentence.
        scratch: Whether nothing is pretrained.

    Returns:
        The rate, and why, as a sentence that ends without a full stop.

    Source: a fixed 3e-4 for LoRA with alpha 32 stays within 2.6 % of the best rate over 104 models and ranks of the
    public Tulu 3 sweep (tinker-cookbook documentation); full fine-tuning about a tenth of it (LoRA primer, same
    place; TRL's reproduction of "LoRA Without Regret"); small models by a pilot with SmolLM2-135M.
    """
    if head == "values":
        rate, why = _values(method, scratch=scratch)
        return Choice(rate, f"{why}; task {task_kind}, {parameters / 1e6:,.1f} M parameters")
    encoder = head == "classifier"
    match method:
        case LoRAMethod():
            rate, why = _lora(parameters, encoder=encoder)
            cap = LORA_ENCODER_CAP if encoder else LORA_CAP
            if steps < FEW_STEPS:
                rate = min(cap, FEW_STEPS_FACTOR * rate)
                why += f"; times {FEW_STEPS_FACTOR:g} because {steps} steps are few"
        case FullMethod():
            rate, why = _full(parameters, encoder=encoder)
        case FreezeMethod(blocks=0):
            rate, why = 1e-3, "only the head moves, and it starts from nothing or close to it"
        case FreezeMethod():
            rate, why = _full(parameters, encoder=encoder)
            rate, why = BLOCKS_FACTOR * rate, f"{BLOCKS_FACTOR:g} times the rate of full fine-tuning ({why}; judgement)"
    return Choice(float(f"{rate:.3g}"), f"{why}; task {task_kind}, {parameters / 1e6:,.0f} M parameters")


def highest_rate(method: MethodSection, *, head: Head, parameters: int) -> float:
    """Above this no search looks; infinite where nothing is known, and only diverging tells.

    Source: the caps above for adapters; 1e-4 for a whole language model and 3e-4 for a whole encoder of more than
    `SMALL` parameters are judgement.
    """
    if head == "values" or parameters <= SMALL:
        return math.inf
    encoder = head == "classifier"
    if isinstance(method, LoRAMethod):
        return LORA_ENCODER_CAP if encoder else LORA_CAP
    full = FULL_ENCODER_CAP if encoder else FULL_CAP
    return full if isinstance(method, FullMethod) else BLOCKS_FACTOR * full


def _values(method: MethodSection, *, scratch: bool) -> tuple[float, str]:
    """Networks of numbers are small and of every kind; the rates held for our network for cells."""
    if scratch:
        return 2e-3, "nothing is pretrained: a network that begins from nothing takes a high rate"
    if isinstance(method, LoRAMethod):
        return 5e-4, "five times the rate of full fine-tuning, for the update is scaled by alpha / rank"
    return 1e-4, "a gentle rate that keeps what was pretrained; a search around it pays"


def _lora(parameters: int, *, encoder: bool) -> tuple[float, str]:
    if encoder and parameters <= 1_000_000_000:
        return 3e-4, "the usual rate for LoRA on an encoder"
    if parameters <= SMALL:
        return (
            5e-4,
            "small language models need more: at 135 M parameters 3e-4 learnt too little, 5e-4 to 8e-4 did well",
        )
    if parameters < 30_000_000_000:
        return 3e-4, "one fixed rate is within 2.6 % of the best over the public sweep of models and ranks"
    return 2e-4, "models of 30 B parameters and more do best a little below 3e-4"


def _full(parameters: int, *, encoder: bool) -> tuple[float, str]:
    if encoder:
        return _full_encoder(parameters)
    if parameters <= SMALL:
        return 1e-4, "small language models stand more: 1e-4 did best in a pilot at 135 M parameters"
    if parameters <= 1_000_000_000:
        return 3e-5, "a tenth of the rate for LoRA"
    if parameters <= 8_000_000_000:
        return 2e-5, "a tenth of the rate for LoRA, rounded down because more than 1 B parameters move"
    return 1e-5, "models above 8 B parameters forget quickly at more"


def _full_encoder(parameters: int) -> tuple[float, str]:
    if parameters < SMALL_ENCODER:
        return (
            4e-4,
            "small encoders stand far more than the usual 3e-5: at 22 M parameters and 77 new classes one pass reached "
            "48 % at 1e-4, 81 % at 4e-4, and 82 % at 1e-3 with half as much drift again",
        )
    if parameters <= 400_000_000:
        return 3e-5, "the usual rate for an encoder of 60 to 400 M parameters"
    return 2e-5, "large encoders take a little less than the usual 3e-5"
