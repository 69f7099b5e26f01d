"""Read a pretrained model whole: every tensor there, every number finite, a tokenizer beside it."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from metier.core import Fault, MetierError, ModelError, UnsafeError, log, rng
from metier.core.words import first_few
from metier.models import demo, safetensors_file
from metier.models.configuration import LOADING_FAULTS, auto_class, cannot_build, configuration_at, foreign_code, read
from metier.models.identity import fingerprint
from metier.models.model import Head, Lineage, Model
from metier.models.silence import quiet
from metier.models.source import Source, locate
from metier.models.structure import head_names

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from metier.recipe import ModelSection

LONGEST_BELIEVABLE_CONTEXT = 10**9
"""transformers writes 1e30 where a tokenizer does not know the model's context."""
QUANTISER_TRACES = ("hf_quantizer", "quantization_method", "is_quantized")
DIGIT_SPLITTERS = ("smollm",)
"""llama.cpp's pre-tokenizers that split numbers into digits. Source: src/llama-vocab.cpp there."""
SAFE_TORCH = (2, 10)
"""The first whose `weights_only=True` holds. Source: CVE-2026-24747."""


def load(section: ModelSection, *, head: Head, labels: tuple[str, ...] | None = None, seed: int = 0) -> Model:
    """Load a model in float32 on the CPU, in evaluation mode.

    Args:
        section: The model.
        head: What it must put out.
        labels: Classes of a classifier, in the order of its outputs; None keeps the checkpoint's own.
        seed: Seed of a new classification head.

    Raises:
        ModelError: If a file is missing or damaged, tensors are missing, misshapen or not finite, or there is no
            tokenizer.
        UnsafeError: If the model brings code of its own and `trust_code` is null, or a weight file carries code.
    """
    with quiet():
        source = locate(section)
        _check_weights(source)
        config = configuration_at(source, section, **_label_changes(head, labels))
        tokenizer = _tokenizer(source, section)
        _complete_tokenizer(tokenizer, config, section.base, say=log.note)
        module, new = _network(source, section, config, head, rng.derive(seed, "head"))
        _own_memory(module)
        _forget_quantizer(module)
        _repair_generation(module)
    _refuse_not_finite(module, section.base)
    _agree(module, tokenizer)
    lineage = Lineage(
        source=section.base,
        path=str(source.folder.resolve()),
        revision=source.revision,
        fingerprint=fingerprint(module, without=new),
        license=_license(source, section),
        reference=_reference(source),
    )
    return Model(module, tokenizer, head, lineage, new)


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer that `load` would bring, without the weights.

    Raises:
        ModelError: If there is no such model or it has no tokenizer.
        UnsafeError: If the model brings code of its own and `trust_code` is null.
    """
    with quiet():
        source, config = read(section)
        tokenizer = demo.packaged_tokenizer() if source is None else _tokenizer(source, section)
        _complete_tokenizer(tokenizer, config, section.base, say=None)
    return tokenizer


def _check_weights(source: Source) -> None:
    """Read the headers of local weights before a library maps them; what the Hub sends is checked by that library.

    Raises:
        ModelError: If a safetensors file is damaged.
        UnsafeError: If there are only pickled weights, and torch is too old to read them without running them.
    """
    if source.gguf is not None or source.is_on_hub:
        return
    safetensors_file.check_folder(source.folder)
    pickles = [*source.folder.glob("*.bin"), *source.folder.glob("*.pt")]
    if pickles and not any(source.folder.glob("*.safetensors")) and _torch_version() < SAFE_TORCH:
        raise UnsafeError(
            f"torch {torch.__version__} can be made to run code by weights that are pickled",
            where=str(pickles[0]),
            hint="pip install 'torch>=2.10', or use a safetensors version of the model",
        )


def _torch_version() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def _reference(source: Source) -> str:
    if source.is_on_hub:
        return source.location
    return str(source.gguf.path.resolve() if source.gguf else source.folder.resolve())


def _label_changes(head: Head, labels: tuple[str, ...] | None) -> dict[str, Any]:
    if head != "classifier" or labels is None:
        return {}
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
    }


def _network(
    source: Source, section: ModelSection, config: PreTrainedConfig, head: Head, seed: int
) -> tuple[nn.Module, tuple[str, ...]]:
    """The network, and the names of its parameters that are new."""
    attention = {} if section.attention == "auto" else {"attn_implementation": section.attention}
    # The GGUF reader draws a progress bar that no setting of transformers mutes.
    bar = contextlib.redirect_stderr(io.StringIO()) if source.gguf else contextlib.nullcontext()
    with torch.random.fork_rng(devices=[]), bar:
        torch.manual_seed(seed)
        try:
            module, report = auto_class(head).from_pretrained(
                source.location,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                # Misshapen tensors are reported by name below; transformers' own error names none.
                ignore_mismatched_sizes=True,
                **attention,
                **source.options,
            )
        except pickle.UnpicklingError as error:
            raise _unsafe_weights(section.base, error) from error
        except LOADING_FAULTS as error:
            raise _cannot_load(section.base, error) from error
    new = _check_complete(module, report, section.base, head)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return module, new + _renewed_outputs(module, source, config, new, head)


def _check_complete(module: nn.Module, report: dict[str, Any], base: str, head: Head) -> tuple[str, ...]:
    """Names of the new head's parameters; anything else that the checkpoint lacks is an error."""
    heads = head_names(module) if head == "classifier" else ()
    misshapen = {name: (tuple(found), tuple(wanted)) for name, found, wanted in report["mismatched_keys"]}
    missing = set(report["missing_keys"])
    new = {name for name in missing | set(misshapen) if _may_be_new(name, heads)}
    faults = [
        Fault(name, f"the checkpoint holds the shape {found}, config.json asks for {wanted}", "get both from one place")
        for name, (found, wanted) in sorted(misshapen.items())
        if name not in new
    ]
    if lacking := sorted(missing - new):
        what = f"the checkpoint lacks {len(lacking)} tensors: {first_few(lacking)}"
        faults.append(Fault(f"model.base={base}", what, "get the model's files again, or name another model"))
    if faults:
        raise ModelError.of(faults)
    if head != "classifier" and report["unexpected_keys"]:
        unused = first_few(sorted(report["unexpected_keys"]))
        log.note(f"the checkpoint holds tensors that the model does not use: {unused}")
    return tuple(name for name, _ in module.named_parameters() if name in new)


def _may_be_new(name: str, heads: Sequence[str]) -> bool:
    """A classifier's head is new, and so is BERT's pooler where the checkpoint was pretrained without it."""
    return bool(heads) and (name.split(".", 1)[0] in heads or "pooler" in name.split("."))


def _renewed_outputs(
    module: nn.Module, source: Source, config: PreTrainedConfig, new: tuple[str, ...], head: Head
) -> tuple[str, ...]:
    """Start the output layer afresh where the checkpoint's was made for other classes, as many by chance."""
    from transformers import AutoConfig

    if head != "classifier" or new or source.gguf is not None:
        return ()
    before = AutoConfig.from_pretrained(source.location, **source.options).id2label
    if before == config.id2label:
        return ()
    heads = head_names(module)
    outputs = {
        name: parameter
        for name, parameter in module.named_parameters()
        if name.split(".")[0] in heads and parameter.shape[0] == config.num_labels
    }
    for parameter in outputs.values():
        spread = getattr(config, "initializer_range", 0.02) if parameter.dim() > 1 else 0.0
        nn.init.normal_(parameter, std=spread)
    log.note("the checkpoint's classification head was made for other classes; a new one takes its place")
    return tuple(outputs)


def _own_memory(module: nn.Module) -> None:
    """Copy every tensor out of the mapped file, tensor by tensor.

    A file maps tensors to wherever its header ends, and matrix kernels round differently on unaligned memory: without
    this, the same weights would answer with different last bits before they are saved and after.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)


def _forget_quantizer(module: nn.Module) -> None:
    """Weights out of a GGUF file are plain float32 here; what still says otherwise would forbid saving them."""
    for trace in QUANTISER_TRACES:
        if trace in vars(module):
            delattr(module, trace)
    config: Any = module.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config


def _repair_generation(module: nn.Module) -> None:
    """Replace generation settings that transformers reads but would refuse to write after the training."""
    from transformers import GenerationConfig

    settings: Any = getattr(module, "generation_config", None)
    if settings is None:
        return
    try:
        settings.validate(strict=True)
    except ValueError as error:
        log.note(f"the model's generation settings contradict themselves and are reset: {' '.join(str(error).split())}")
        module.generation_config = GenerationConfig.from_model_config(module.config)  # type: ignore[assignment]


def _refuse_not_finite(module: nn.Module, base: str) -> None:
    bad = [name for name, tensor in module.state_dict().items() if tensor.is_floating_point() and not _finite(tensor)]
    if bad:
        raise ModelError(
            f"numbers that are not finite in {len(bad)} tensors: {first_few(bad)}",
            where=f"model.base={base}",
            hint="the file is damaged, or its training diverged; get it again or name another model",
        )


def _finite(tensor: torch.Tensor) -> bool:
    if tensor.numel() == 0:
        return True
    # Smallest and largest are NaN if any value is, and need no copy of the tensor.
    low, high = torch.aminmax(tensor)
    return bool(low.isfinite() and high.isfinite())


def _tokenizer(source: Source, section: ModelSection) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if source.gguf is None and not source.is_on_hub and not _has_tokenizer(source):
        raise _no_tokenizer(section.base)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source.location, **source.options)
    except LOADING_FAULTS as error:
        path = source.folder / "tokenizer_config.json"
        if "trust_remote_code" in str(error) and path.is_file():
            raise foreign_code(json.loads(path.read_text("utf-8")).get("auto_map"), source, path) from error
        raise _no_tokenizer(section.base, error) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise _no_tokenizer(section.base)
    if source.gguf is not None:
        _split_digits(tokenizer, source.gguf.metadata.get("tokenizer.ggml.pre"))
    return tokenizer  # type: ignore[no-any-return]


def _has_tokenizer(source: Source) -> bool:
    """Whether a local folder holds any vocabulary; without one, transformers may build an empty tokenizer."""
    wanted = re.compile(r"tokenizer.*\.(json|model)|.*vocab.*|.*\.(model|tiktoken|bpe)|added_tokens\.json|merges\.txt")
    return any(wanted.fullmatch(path.name) for path in source.folder.iterdir() if path.name != "tokenizer_config.json")


def _split_digits(tokenizer: Any, kind: str | None) -> None:
    """Put back what a tokenizer rebuilt from GGUF metadata lost: digits stand alone."""
    from tokenizers import pre_tokenizers

    if kind in DIGIT_SPLITTERS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    else:
        log.note("the tokenizer is rebuilt from the GGUF file; it may cut rare text otherwise than the original")


def _complete_tokenizer(
    tokenizer: Any, config: PreTrainedConfig, base: str, *, say: Callable[[str], None] | None
) -> None:
    """Give the tokenizer a pad token and the model's context where it has none."""
    if tokenizer.pad_token_id is None:
        stand_in = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
        if stand_in is None:
            raise ModelError(
                "the tokenizer has no pad token and none that could stand in for it",
                where=f"model.base={base}",
                hint='name one in its tokenizer_config.json: "pad_token"',
            )
        tokenizer.pad_token = stand_in
        if say:
            say(f"the tokenizer has no pad token; {stand_in} stands in, which changes nothing that is learnt")
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest and tokenizer.model_max_length > LONGEST_BELIEVABLE_CONTEXT:
        tokenizer.model_max_length = longest


def _agree(module: Any, tokenizer: Any) -> None:
    """Give the network the tokenizer's idea of padding; say where their vocabularies differ."""
    text = module.config.get_text_config()
    if getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = module.config.pad_token_id = tokenizer.pad_token_id
    settings = getattr(module, "generation_config", None)
    if settings is not None and settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id
    rows = module.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        log.note(f"the tokenizer knows {len(tokenizer):,} tokens, the model {rows:,}; the last ones cannot be used")


def _license(source: Source, section: ModelSection) -> str | None:
    """What the front matter of the model card says."""
    if source.gguf is not None:
        said = source.gguf.metadata.get("general.license")
        return str(said) if said else None
    card = source.folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else _hub_card(source, section)
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    line = re.search(r"^license:\s*['\"]?([\w.+-]+)", front[1], re.MULTILINE) if front else None
    return line[1] if line else None


def _hub_card(source: Source, section: ModelSection) -> str:
    """The model card of a Hub model; a card that cannot be had says nothing, which is no reason to stop."""
    if not source.is_on_hub:
        return ""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        with quiet():
            card = hf_hub_download(section.base, "README.md", revision=source.revision)
        return Path(card).read_text(encoding="utf-8", errors="replace")
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        return ""


def _cannot_load(base: str, error: BaseException) -> MetierError:
    said = str(error)
    if "weights_only" in said or "Weights only" in said:
        return _unsafe_weights(base, error)
    if "no file named" in said:
        return ModelError(
            "the folder holds no weights that transformers reads",
            where=f"model.base={base}",
            hint="it needs model.safetensors (or pytorch_model.bin) beside config.json",
        )
    return cannot_build(base, error)


def _unsafe_weights(base: str, error: BaseException) -> UnsafeError:
    return UnsafeError(
        f"a weight file holds more than tensors, so it could run code: {' '.join(str(error).split())[:200]}",
        where=f"model.base={base}",
        hint="use a safetensors version of the model",
    )


def _no_tokenizer(base: str, error: BaseException | None = None) -> ModelError:
    said = f": {' '.join(str(error).split())[:300]}" if error else ""
    return ModelError(
        f"the model has no tokenizer that can be read{said}",
        where=f"model.base={base}",
        hint="copy tokenizer.json and tokenizer_config.json of the same model into its folder",
    )
