"""`guards:` -- what holds a network back from forgetting while it trains."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from metier.recipe.section import Section


class GuardsSection(Section):
    """Guards against forgetting that work while the network trains; null leaves one out. `metier compare` tells whether they help on your data."""

    kl: Annotated[float, Field(gt=0)] | None = None
    """Weight of the divergence from the base, KL(base || tuned) in nats on every learnt token, added to the loss; such as 0.1. The base's 20 likeliest tokens of each place are noted once before training, all others count as one. For causal language models. Source: Li and Hoiem 2016, arXiv:1606.09282 (the base's answers on the new rows are kept); arXiv:2509.04259 (forgetting follows this divergence)."""
    mask_improbable: Annotated[float, Field(gt=1)] | None = None
    """Learnt tokens whose perplexity under the base is above this, such as 2.5, are not learnt; the last token of a reply always is, for it teaches to stop. Refused where more than 40 % of the tokens would be left out. For causal language models. Source: Wu et al. 2025, arXiv:2501.14315 (selective token masking)."""
    l2_sp: Annotated[float, Field(gt=0)] | None = None
    """Pull of every weight towards where it began: the gradient of l2_sp / 2 times the squared distance is added to that of the loss, such as 0.01. New heads have no such place and are not pulled; for full and freeze, any network. Holds a second copy of what moves. Source: Li et al. 2018, arXiv:1802.01483."""

    @property
    def on(self) -> tuple[str, ...]:
        """Names of the guards that are asked for."""
        return tuple(name for name in type(self).model_fields if getattr(self, name) is not None)
