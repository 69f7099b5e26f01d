"""What a model is, answered from its configuration: a wrong one is refused before any weight is read."""

from __future__ import annotations

import difflib
import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from metier.core import ModelError, UnsafeError
from metier.models import demo
from metier.models.lean.trunk import drops
from metier.models.shape import LinearShape, Shape
from metier.models.silence import quiet
from metier.models.source import Source, code_digest, locate, require_demo
from metier.models.structure import head_names, linears

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig

    from metier.models.model import Head
    from metier.recipe import ModelSection

LOADING_FAULTS = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError),
    SafetensorError,
)
"""What transformers raises, in one place or another, when files are not what it expects."""
UNBOUNDED_CONTEXT = 1_000_000
"""Stands for "as long as memory allows" where positions are relative, as in T5."""


def describe(section: ModelSection, *, head: Head | None = None, classes: int | None = None) -> Shape:
    """Sizes of the model, exact to the parameter; the network is built without storage.

    Args:
        section: The model.
        head: The head to count; None takes the one its configuration asks for.
        classes: Rows of a classifier's head; None takes what the configuration says.

    Raises:
        ModelError: If there is no such model, or transformers cannot build it.
        UnsafeError: If the model brings code of its own and `trust_code` is null.
    """
    return shape_of(skeleton(section, head=head, classes=classes))


def skeleton(section: ModelSection, *, head: Head | None = None, classes: int | None = None) -> nn.Module:
    """The network without storage for its numbers; arguments and errors as for `describe`."""
    with quiet():
        source, config = read(section)
        chosen = head or head_of(config, section.base)
        if chosen == "classifier" and classes is not None:
            config.num_labels = classes
        given = source.options if source else {}
        options = {name: given[name] for name in ("trust_remote_code", "code_revision") if name in given}
        try:
            with torch.device("meta"):
                module: nn.Module = auto_class(chosen).from_config(config, **options)
        except LOADING_FAULTS as error:
            raise cannot_build(section.base, error) from error
    return module


def describe_head(section: ModelSection) -> Head:
    """The head that the model's configuration asks for: a decoder's, an encoder-decoder's, or a classifier.

    Raises:
        ModelError: If there is no such model, or it is none of the three.
        UnsafeError: If the model brings code of its own and `trust_code` is null.
    """
    with quiet():
        _, config = read(section)
        return head_of(config, section.base)


def read(section: ModelSection) -> tuple[Source | None, PreTrainedConfig]:
    """The model's files (None for the demo's, which may not be converted yet) and its configuration."""
    if section.base.startswith("demo:"):
        require_demo(section)
        return None, demo.configuration()
    source = locate(section)
    return source, configuration_at(source, section)


def configuration_at(source: Source, section: ModelSection, **changes: Any) -> PreTrainedConfig:
    """The configuration of a located model.

    Raises:
        ModelError: If it cannot be read, is of a family that transformers does not know, or is quantised.
        UnsafeError: If it needs code that the recipe does not trust.
    """
    from transformers import AutoConfig

    if source.gguf is None:
        _check_raw(source, section)
    try:
        config: Any = AutoConfig.from_pretrained(source.location, **source.options, **changes)
    except LOADING_FAULTS as error:
        raise cannot_build(section.base, error) from error
    if source.gguf is None and getattr(config, "quantization_config", None):
        raise ModelError(
            "the checkpoint is quantised; it can be run but not fine-tuned in full precision",
            where=f"model.base={section.base}",
            hint="name the original model that it was made from",
        )
    return config


def _check_raw(source: Source, section: ModelSection) -> None:
    """Read config.json as plain data first: transformers would offer to run code, or fail in its own words."""
    from transformers import CONFIG_MAPPING

    path = source.folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"not valid JSON: {error}", where=str(path), hint="get the model's files again") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise ModelError('it names no "model_type"', where=str(path), hint="name a model that transformers reads")
    family, code = raw["model_type"], raw.get("auto_map")
    if section.trust_code is not None:
        _refuse_other_places(code, source, path)
        return
    if kernels := [
        str(value) for key, value in raw.items() if key.endswith("attn_implementation") and "/" in str(value)
    ]:
        hint = "take the line out of config.json"
        raise UnsafeError(f"the model asks for compiled code of the Hub: {kernels[0][:80]}", where=str(path), hint=hint)
    if family in CONFIG_MAPPING:
        return
    if code:
        raise foreign_code(code, source, path)
    near = difflib.get_close_matches(family, list(CONFIG_MAPPING), 1, 0.7)
    raise ModelError(
        f"the installed transformers knows no model type {family!r}",
        where=str(path),
        hint=f"did you mean {near[0]!r}?" if near else "pip install --upgrade transformers",
    )


def _refuse_other_places(code: Any, source: Source, path: Path) -> None:
    """What pins a folder's code says nothing about code that the folder fetches from elsewhere."""
    if not source.is_on_hub and (elsewhere := [name for name in _code_files(code) if "--" in name]):
        what = f"the model fetches code from another place: {', '.join(elsewhere)}"
        raise UnsafeError(what, where=str(path), hint="name that Hub model itself, with model.trust_code=<its commit>")


def foreign_code(code: Any, source: Source, path: Path) -> UnsafeError:
    """The refusal of a model that brings code, with what would let it run."""
    pin = source.revision or "<40-hex commit>" if source.is_on_hub else code_digest(source.folder)
    return UnsafeError(
        f"the model brings code of its own ({', '.join(_code_files(code))}), which would run on this machine",
        where=str(path),
        hint=f"read it; to run it as it is now: model.trust_code={pin} (--trust-code on the command line)",
    )


def _code_files(code: Any) -> list[str]:
    entries = code.values() if isinstance(code, dict) else ()
    classes = [name for entry in entries for name in (entry if isinstance(entry, list) else [entry]) if name]
    return sorted({f"{str(name).rsplit('.', 1)[0]}.py" for name in classes}) or ["auto_map"]


def head_of(config: PreTrainedConfig, base: str) -> Head:
    """The head of a configuration, by transformers' own mapping of classes.

    Its class name decides; a bare model is judged by what its family can be. An encoder is what transformers can give
    a masked-word head.

    Raises:
        ModelError: If no mapping has it.
    """
    from transformers.models.auto import modeling_auto as auto

    families: list[tuple[Head, Any, Any]] = [
        ("classifier", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, auto.MODEL_FOR_MASKED_LM_MAPPING),
        ("classifier", auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, None),
        ("seq2seq", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
        ("causal", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_CAUSAL_LM_MAPPING),
    ]
    if getattr(config, "is_encoder_decoder", False):
        # BART and its kin can be given every head; as encoder-decoders they are pretrained to write.
        families.sort(key=lambda family: family[0] != "seq2seq")
    for name in getattr(config, "architectures", None) or ():
        for head, names, _ in families:
            if name in names.values():
                return head
    for head, _, mapping in families:
        if mapping is not None and type(config) in mapping:
            return head
    return _head_of_foreign_code(config, base)


def _head_of_foreign_code(config: PreTrainedConfig, base: str) -> Head:
    code = getattr(config, "auto_map", None) or {}
    heads: tuple[Head, ...] = ("causal", "seq2seq", "classifier")
    for head in heads:
        if auto_class(head).__name__ in code:
            return head
    raise ModelError(
        f"a {config.model_type!r} model is no language model",
        where=f"model.base={base}",
        hint="name a decoder, an encoder or an encoder-decoder of text",
    )


def auto_class(head: Head) -> Any:
    """The Auto class of transformers that builds a network with this head."""
    import transformers

    return {
        "causal": transformers.AutoModelForCausalLM,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
        "classifier": transformers.AutoModelForSequenceClassification,
    }[head]


def shape_of(module: Any) -> Shape:
    """Sizes of a network that transformers built, with or without storage."""
    config = module.config
    text = config.get_text_config()
    embedding = module.get_input_embeddings()
    linears = tuple(_linears(module))
    heads = getattr(text, "num_attention_heads", 1)
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    return Shape(
        architecture=next(iter(getattr(config, "architectures", None) or ()), type(module).__name__),
        model_type=config.model_type,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        embedding_parameters=sum(parameter.numel() for parameter in embedding.parameters()),
        linears=linears,
        layers=max(text.num_hidden_layers, _blocks(module)),
        hidden=text.hidden_size,
        # The last layer of a feed-forward part reads its whole width; not every family names that width alike.
        feed_forward=getattr(text, "intermediate_size", None) or max((n.inputs for n in linears), default=0),
        key_value=key_heads * (getattr(text, "head_dim", None) or text.hidden_size // heads),
        vocabulary=_vocabulary(module, text),
        context=_context(module, text),
        gated=_is_gated(text, linears),
        packs=(packs := _packs(module)),
        shares=packs and module.get_output_embeddings() is not None and not drops(module),
    )


def _packs(module: Any) -> bool:
    """Whether attention goes through transformers' table, with SDPA; encoder-decoders are never packed."""
    supports = all(getattr(module, f"_supports_{name}", False) for name in ("sdpa", "attention_backend"))
    return supports and not getattr(module.config, "is_encoder_decoder", False)


def _is_gated(text: Any, linears: tuple[LinearShape, ...]) -> bool:
    """By a layer called gate, T5's own word for it, or one layer that makes both halves at once."""
    feed_forward = getattr(text, "intermediate_size", None)
    is_fused = any(
        n.inputs == text.hidden_size and feed_forward and n.outputs == 2 * feed_forward and ".mlp." in n.name
        for n in linears
    )
    has_gate = any("gate" in linear.name.rsplit(".", 1)[-1] for linear in linears)
    return has_gate or is_fused or bool(getattr(text, "is_gated_act", False))


def _linears(module: nn.Module) -> list[LinearShape]:
    found = []
    for name, layer in linears(module):
        rows, columns = layer.get_parameter("weight").shape
        # GPT-2's transposed layer keeps its weight as (inputs, outputs).
        inputs, outputs = (columns, rows) if isinstance(layer, nn.Linear) else (rows, columns)
        found.append(LinearShape(name, inputs, outputs))
    return found


def _blocks(module: nn.Module) -> int:
    """Blocks in the outermost stacks; an encoder's and a decoder's both count."""
    stacks = {name: len(child) for name, child in module.named_modules() if isinstance(child, nn.ModuleList)}
    return sum(n for name, n in stacks.items() if not any(name.startswith(f"{other}.") for other in stacks))


def _vocabulary(module: Any, text: Any) -> int:
    output = module.get_output_embeddings()
    if output is not None:
        return int(output.weight.shape[0])
    return int(module.config.num_labels) if head_names(module) else int(text.vocab_size)


def _context(module: nn.Module, text: Any) -> int:
    longest = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if longest is None:
        return UNBOUNDED_CONTEXT
    for name, child in module.named_modules():
        # RoBERTa and its kin number positions from padding_idx + 1.
        if name.endswith("position_embeddings") and getattr(child, "padding_idx", None) is not None:
            return int(longest) - int(child.padding_idx) - 1  # type: ignore[arg-type]
    return int(longest)


def cannot_build(base: str, error: BaseException) -> ModelError:
    """What transformers refused, in one line of ours."""
    said = " ".join(str(error).split()) or type(error).__name__
    return ModelError(
        f"transformers cannot read the model: {said[:400]}",
        where=f"model.base={base}",
        hint="check that its files are complete and of a family that transformers reads",
    )
