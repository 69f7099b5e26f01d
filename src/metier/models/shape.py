"""What a model is made of, read from its configuration alone; no weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinearShape:
    """One linear layer (or GPT-2's Conv1D): its full name and its sizes."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a transformer.

    Attributes:
        architecture: Class name in the configuration, such as "LlamaForCausalLM".
        model_type: transformers' word for the family, such as "llama".
        parameters: Numbers in the model; tied weights count once.
        embedding_parameters: Numbers in the input embedding; a tied head is among them.
        linears: Every linear layer inside the blocks, the head not among them.
        layers: Decoder or encoder blocks.
        hidden: Width of the residual stream.
        feed_forward: Width inside a block's feed-forward part.
        key_value: Width of the keys, smaller than `hidden` with grouped-query attention.
        vocabulary: Rows of the output head: tokens, or classes.
        context: Longest input the positions allow, in tokens.
        gated: Whether the feed-forward part has a gate (SwiGLU and its kin).
        packs: Whether its class says that its attention can be told about packs; trying it tells for sure.
        shares: Whether rows in a pack may then share what they begin with alike: a decoder in which nothing is dropped.
    """

    architecture: str
    model_type: str
    parameters: int
    embedding_parameters: int
    linears: tuple[LinearShape, ...]
    layers: int
    hidden: int
    feed_forward: int
    key_value: int
    vocabulary: int
    context: int
    gated: bool
    packs: bool = False
    shares: bool = False
