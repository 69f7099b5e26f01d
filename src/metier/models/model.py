"""A loaded model: the network, what reads text for it, and where both came from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

Head = Literal["causal", "seq2seq", "classifier", "values"]
"""What the network puts out: next tokens, a decoder's tokens, one score for each class, or numbers."""


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
    """A network in float32 on the CPU, its kind of head, its lineage, and its tokenizer if it reads text.

    Attributes:
        module: The network.
        tokenizer: Its tokenizer, which always has a pad token; None where the network reads no text.
        head: What the network puts out.
        lineage: Where the weights came from.
        new: Names of parameters that the checkpoint did not hold: a new head's, and BERT's pooler where the checkpoint
            was pretrained without it. They must move, and must be stored with an adapter.
        whole: Names of parameters that the checkpoint did hold, but that must move and be stored likewise, such as an
            output layer that is fitted before tuning.
    """

    module: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    head: Head
    lineage: Lineage
    new: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()

    def with_module(self, module: nn.Module) -> Model:
        """The same model around another network, such as the tuned one."""
        return replace(self, module=module)
