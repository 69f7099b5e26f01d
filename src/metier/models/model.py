"""A loaded model: the network, its tokenizer, and where both came from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

Head = Literal["causal", "seq2seq", "classifier"]
"""What the network puts out: next tokens, a decoder's tokens, or one score for each class."""


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where the weights came from.

    Attributes:
        source: What the recipe named.
        path: Folder the weights were read from.
        revision: Commit of a Hub model, where known.
        fingerprint: Hex sha256 over names, shapes and evenly spaced samples of every base tensor: tells two bases
            apart, and is no proof against tampering.
        license: As the model card says, where it says so.
        reference: How another program finds the base: the Hub id, the file, or the folder.
    """

    source: str
    path: str
    revision: str | None
    fingerprint: str
    license: str | None
    reference: str


@dataclass(frozen=True, slots=True)
class Model:
    """A network in float32 on the CPU, its tokenizer, its kind of head, and its lineage.

    Attributes:
        module: The network.
        tokenizer: Its tokenizer; it always has a pad token.
        head: What the network puts out.
        lineage: Where the weights came from.
        new: Names of parameters that the checkpoint did not hold: a new head's, and BERT's pooler where the checkpoint
            was pretrained without it. They must move, and must be stored with an adapter.
    """

    module: nn.Module
    tokenizer: PreTrainedTokenizerBase
    head: Head
    lineage: Lineage
    new: tuple[str, ...] = ()

    def with_module(self, module: nn.Module) -> Model:
        """The same model around another network, such as the tuned one."""
        return replace(self, module=module)
