"""Sizes of an scTranslator, and what is said where ids or counts do not fit them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from metier.core import Fault, ModelError
from metier.core.words import first_few


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the network.

    Attributes:
        dim: Width of a token.
        genes: Genes that the bridge takes.
        proteins: Proteins that it gives.
        bridge: Width between the two.
        vocabulary: Ids of genes and proteins, 0 for padding.
        heads: Attention heads.
        head_dim: Width of a head.
        features: Random features of a head.
        encoder_blocks: Blocks over genes.
        decoder_blocks: Blocks over proteins.
    """

    dim: int
    genes: int
    proteins: int
    bridge: int
    vocabulary: int = 85_500
    heads: int = 8
    head_dim: int = 64
    features: int = 266
    encoder_blocks: int = 2
    decoder_blocks: int = 2

    @classmethod
    def of(cls, dim: int, genes: int, proteins: int) -> Shape:
        """The published proportions for these sizes."""
        return cls(dim, genes, proteins, math.ceil(math.sqrt(genes * proteins)))


def check_panels(shape: Shape, *, genes: int, proteins: int) -> None:
    """Refuse more genes or proteins than the bridge was made for.

    Raises:
        ModelError: With the counts.
    """
    faults = [
        Fault(f"model: {word}", f"{found:,} {word}, but the network holds {most:,}", f"choose at most {most:,} of them")
        for word, found, most in (("genes", genes, shape.genes), ("proteins", proteins, shape.proteins))
        if found > most
    ]
    if faults:
        raise ModelError.of(faults)


def foreign_ids(ids: Sequence[int], shape: Shape) -> ModelError:
    """The refusal of ids that the network does not have."""
    return ModelError(
        f"{len(ids)} ids are none of the network's: {first_few(ids)}",
        where="model",
        hint=f"its ids begin at 1 and end at {shape.vocabulary - 1:,}; take them from its own id table (my_Id)",
    )
