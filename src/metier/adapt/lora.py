"""Low-rank adaptation through peft, whose file format the world loads. Source: Hu et al. 2021, arXiv:2106.09685."""

from __future__ import annotations

import difflib
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from metier.adapt.adapted import Adapted, finish
from metier.core import Fault, ModelError, RecipeError
from metier.core.files import storage_error
from metier.models.shape import LinearShape
from metier.models.silence import quiet
from metier.models.structure import head_names, linears, output_layer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from torch import nn

    from metier.recipe import LoRAMethod

TASK_TYPES = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "classifier": "SEQ_CLS"}
"""peft's word for each kind of head, so that its Auto classes can load the adapter."""
CONFIGURATION, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""Files of an adapter, as peft names them."""
ROLES = (
    ("q_proj", "query", "to_q", "q_lin", "q", "c_attn", "qkv_proj", "query_key_value", "Wqkv"),
    ("k_proj", "key", "to_k", "k_lin", "k", "c_attn", "qkv_proj", "query_key_value", "Wqkv"),
    ("v_proj", "value", "to_v", "v_lin", "v", "c_attn", "qkv_proj", "query_key_value", "Wqkv"),
    ("o_proj", "out_proj", "out_lin", "o", "c_proj", "dense"),
    ("up_proj", "fc1", "c_fc", "lin1", "wi", "dense_h_to_4h"),
    ("down_proj", "fc2", "c_proj", "lin2", "wo", "dense_4h_to_h"),
)
"""Names that families give to one and the same layer; the fused ones stand for several."""


def adapt(
    module: nn.Module, method: LoRAMethod, *, head: str | None, base_name: str, new: Sequence[str] = ()
) -> Adapted:
    """Wrap the network so that only low-rank updates, and a new classification head, move.

    Args:
        module: The network, float32.
        method: Rank, scale and targets.
        head: Kind of head ("causal", "seq2seq", "classifier"), None for a plain module.
        base_name: What adapter_config.json names as the base.
        new: Parameters that no checkpoint held; their layers move whole and are stored with the adapter.

    Raises:
        RecipeError: If a target names no linear layer (the message lists what exists), or none is left.
    """
    from peft import LoraConfig, get_peft_model

    whole = whole_layers(module, new)
    names = [name for name in target_names(module, method.targets) if name not in whole]
    if not names:
        raise _nothing_to_adapt(method, whole)
    config = LoraConfig(
        task_type=TASK_TYPES.get(head or ""),
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=shortest(names, [name for name, _ in module.named_modules()]),
        modules_to_save=list(whole) or None,
        use_rslora=method.variant == "rslora",
        use_dora=method.variant == "dora",
        fan_in_fan_out=_is_transposed(module, names),
        bias="none",
    )
    with quiet():  # peft reads names that transformers has deprecated; the user can do nothing about it
        wrapped: Any = get_peft_model(module, config)  # type: ignore[arg-type]
    wrapped.peft_config["default"].base_model_name_or_path = base_name
    said = "every linear layer but the head" if method.targets == "auto" else ", ".join(method.targets)
    title = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA"}[method.variant]
    return finish(wrapped, f"{title}, rank {method.rank}, alpha {method.alpha:g}, {said}")


def switched_off(module: nn.Module) -> AbstractContextManager[Any]:
    """The network as it is without its adapter while the `with` runs; a network that has none stays as it is."""
    off = getattr(module, "disable_adapter", None)
    return off() if callable(off) else nullcontext()


def check(module: nn.Module, method: LoRAMethod) -> None:
    """Refuse targets that are not there, and a rank that no layer can have.

    Raises:
        RecipeError: With everything that does not fit.
    """
    sides = [min(linear.inputs, linear.outputs) for linear in shape_of_linears(module, method.targets)]
    if sides and method.rank > max(sides):
        raise RecipeError(
            f"rank {method.rank} is more than the {max(sides)} that the largest layer can have",
            where="method.rank",
            hint=f"choose less than {max(sides)}; 8 to 64 is usual, and beyond that method=full learns more",
        )


def _nothing_to_adapt(method: LoRAMethod, whole: Sequence[str]) -> RecipeError:
    if method.targets != "auto":
        what = (
            "no layer is left to adapt: what is named is new and moves whole" if whole else "no layer is left to adapt"
        )
        return RecipeError(what, where="method.targets", hint="name some, or set it to auto")
    what = "no layer is left to adapt: nothing here is pretrained" if whole else "the network has no linear layer"
    return RecipeError(what, where="method", hint="use method=full")


def save_adapter(module: nn.Module, folder: Path) -> None:
    """Write the adapter in peft's format: adapter_config.json and adapter_model.safetensors.

    Raises:
        StorageError: If the folder cannot be written.
    """
    from safetensors import SafetensorError

    wrapped: Any = module
    try:
        # "auto" would ask the Hub about the base's vocabulary; embeddings never move here.
        wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    except SafetensorError as error:
        raise storage_error(folder, OSError(str(error))) from error
    except OSError as error:
        raise storage_error(folder, error) from error


def load_adapter(module: nn.Module, folder: Path, *, name: str = "default") -> nn.Module:
    """Wrap the base with a saved adapter, for inference; `name` tells it from others on the same base.

    Raises:
        ModelError: If the adapter does not fit the base, or cannot be read.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    lacking = [name for name in (CONFIGURATION, WEIGHTS) if not (folder / name).is_file()]
    if lacking:
        what = f"the adapter lacks {' and '.join(lacking)}"
        raise ModelError(what, where=str(folder), hint="copy the whole folder again, or train again in another folder")
    try:
        with quiet():
            wrapped: nn.Module = PeftModel.from_pretrained(module, str(folder), adapter_name=name)  # type: ignore[arg-type]
    except SafetensorError as error:
        raise ModelError(
            f"the adapter's file is damaged: {error}",
            where=str(folder),
            hint="copy it again, or train again in another folder",
        ) from error
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"the adapter does not fit this base: {str(error).splitlines()[0]}",
            where=str(folder),
            hint="load it on the base that adapter_config.json names",
        ) from error
    return wrapped.eval()


def merged(module: nn.Module) -> nn.Module:
    """The base with the update added to its weights; the wrapped network must not be used afterwards.

    Sums are new tensors: a base whose memory others share keeps its bits.
    """
    wrapped: Any = module
    result: nn.Module = wrapped.merge_and_unload(safe_merge=True)
    return result


def target_names(module: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Full names of the layers to adapt.

    Raises:
        RecipeError: If a target matches no linear layer.
    """
    known = [name for name, _ in linears(module)]
    if targets == "auto":
        return known
    chosen: list[str] = []
    faults = []
    for target in targets:
        found = [name for name in known if name == target or name.endswith(f".{target}")]
        chosen += found
        if not found:
            faults.append(_no_such_target(target, known))
    if faults:
        raise RecipeError.of(faults)
    return sorted(set(chosen), key=known.index)


def shape_of_linears(
    module: nn.Module, targets: str | Sequence[str], *, without: Sequence[str] = ()
) -> tuple[LinearShape, ...]:
    """Sizes of the layers that would be adapted; `without` are parameters whose layers move whole.

    Raises:
        RecipeError: If a target matches no linear layer.
    """
    whole = whole_layers(module, without)
    found = []
    for name in target_names(module, targets):
        if name not in whole:
            outputs, inputs = module.get_submodule(name).get_parameter("weight").shape
            found.append(LinearShape(name, inputs, outputs))
    return tuple(found)


def shortest(names: Sequence[str], everything: Iterable[str]) -> list[str]:
    """Last words that match exactly `names` among all module names, else the full names.

    Short targets keep adapter_config.json readable and independent of wrappers; but a last word that would also
    hit another module (such as `dense` in a head) must not be used.
    """
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    wanted = set(names)
    hit = {name for name in everything if name.rsplit(".", 1)[-1] in endings}
    return endings if hit == wanted else list(names)


def whole_layers(module: nn.Module, new: Sequence[str]) -> tuple[str, ...]:
    """Modules that move whole: a classifier's head, never a language model's, and layers that no checkpoint held."""
    heads = () if output_layer(module) is not None else head_names(module)
    others = dict.fromkeys(name.rpartition(".")[0] for name in new if name.split(".")[0] not in heads)
    return (*heads, *others)


def _no_such_target(target: str, known: Sequence[str]) -> Fault:
    endings = sorted({name.rsplit(".", 1)[-1] for name in known})
    alike = [word for role in ROLES if target in role for word in role if word in endings]
    alike += difflib.get_close_matches(target.rsplit(".", 1)[-1], endings, 1, 0.4)
    meant = f"did you mean {alike[0]}? " if alike else ""
    return Fault("method.targets", f"{target!r} matches no linear layer", f"{meant}Layers here: {', '.join(endings)}")


def _is_transposed(module: nn.Module, names: Sequence[str]) -> bool:
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module.get_submodule(name), Conv1D) for name in names)
