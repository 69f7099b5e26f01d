"""Networks that no library of ours knows: any `nn.Module` that can be imported, with weights that are read safely."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from metier.core import Fault, MetierError, ModelError, RecipeError, log
from metier.core.files import sha256, write_json
from metier.core.words import first_few
from metier.models import pickled, safetensors_file
from metier.models.tensors import write_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from metier.recipe import ModelSection

NEW = "new"
"""What `model.base` says where there are no pretrained weights."""
WEIGHTS, CONFIG = "model.safetensors", "config.json"


def imported(use: str, *, where: str) -> Any:
    """What "package.module:Name" names; modules beside the working directory are found as well.

    Raises:
        RecipeError: If it cannot be imported or is not there.
    """
    module_name, _, name = use.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module_name), name, None)
    except ImportError as error:
        hint = "install it, or begin from the folder in which it lies"
        raise RecipeError(f"cannot import {module_name}: {error}", where=f"{where}: {use}", hint=hint) from error
    except Exception as error:
        raise theirs(error, f"importing {module_name}", where=f"{where}: {use}") from error
    if found is None:
        raise RecipeError(
            f"{module_name} has no {name}", where=f"{where}: {use}", hint="check the name after the colon"
        )
    return found


def source_digest(use: str) -> str:
    """Hex sha256 of the file that the named class stands in; of its name where there is no file."""
    found = imported(use, where="use")
    try:
        file = inspect.getsourcefile(found)
    except TypeError:  # made by C code
        file = None
    return sha256(Path(file)) if file else hashlib.sha256(use.encode()).hexdigest()


def called(use: str, arguments: Mapping[str, Any], *, where: str) -> Any:
    """What the named class or function makes of the arguments.

    Raises:
        RecipeError: If it does not take them.
    """
    make = imported(use, where=where)
    try:
        takes = inspect.signature(make)
        takes.bind(**arguments)
    except ValueError:  # what C code made has no signature: the call itself will tell
        takes = inspect.Signature()
    except TypeError as error:
        raise RecipeError(str(error), where=f"{where}.arguments", hint=f"it takes {takes}") from error
    with in_their_code(f"making {use}", where=where):
        return make(**arguments)


@contextmanager
def in_their_code(doing: str, *, where: str) -> Iterator[None]:
    """Whatever a user's own code raises is told as theirs, with its file and line; our own errors pass.

    Raises:
        RecipeError: In place of what was raised.
    """
    try:
        yield
    except MetierError:
        raise
    except Exception as error:
        raise theirs(error, doing, where=where) from error


def theirs(error: Exception, doing: str, *, where: str) -> RecipeError:
    """What a user's own code raised, with the place in it."""
    ours = str(Path(__file__).parents[1])
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    told = [frame for frame in frames if "site-packages" not in frame.filename and "importlib" not in frame.filename]
    place = f" at {told[-1].filename}:{told[-1].lineno}" if told else ""
    if isinstance(error, SyntaxError):
        place = f" at {error.filename}:{error.lineno}"
    said = " ".join(str(error).split())[:300]
    what = f"{doing} raised {type(error).__name__}{place}: {said}"
    return RecipeError(what, where=where, hint="correct it there")


def build(section: ModelSection, seed: int, *, strict: bool = False) -> tuple[nn.Module, tuple[str, ...]]:
    """The network, and the names of its parameters that the weights do not hold.

    Args:
        section: The model.
        seed: Seed of what is new.
        strict: Whether the weights must be all there are, as of a network that was saved whole.

    Raises:
        RecipeError: If the class cannot be imported or called.
        ModelError: If the weights do not fit.
    """
    use = str(section.use)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = called(use, section.arguments, where="model.use")
    if not isinstance(module, nn.Module):
        raise RecipeError(f"{use} made no torch.nn.Module", where="model.use", hint="name a class of networks")
    module = module.float().eval()
    names = tuple(name for name, _ in module.named_parameters())
    if section.base == NEW:
        return module, names
    tensors = read_weights(Path(section.base).expanduser())
    fill(module, tensors, where=section.base)
    new = tuple(name for name in names if name not in tensors)
    if strict and (new or tensors.keys() - module.state_dict().keys()):
        lost = first_few([*new, *(tensors.keys() - module.state_dict().keys())])
        what = f"{use} is not the class that was tuned: it and the weights differ in {lost}"
        raise ModelError(what, where=section.base, hint="put the class back as it was, or tune again")
    return module, new


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of any kind, or of a folder that `save` wrote; nothing that a file names is run.

    Raises:
        ModelError: If there is none, or it is damaged.
    """
    if path.is_dir():
        path /= WEIGHTS
    if path.suffix != ".safetensors":
        return dict(pickled.read(path).tensors)
    return safetensors_file.load(path)


def fill(module: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Put the weights into the network; what the file does not hold keeps its fresh values, what is left over is told.

    Raises:
        ModelError: If nothing fits, or a tensor has another shape.
    """
    own = module.state_dict()
    faults = [
        Fault(name, f"has the shape {tuple(tensor.shape)} instead of {tuple(own[name].shape)}", "check model.arguments")
        for name, tensor in sorted(tensors.items())
        if name in own and own[name].shape != tensor.shape
    ]
    strangers = sorted(tensors.keys() - own.keys())
    what = f"{len(strangers)} of {len(tensors)} tensors have no place in the network: {first_few(strangers)}"
    if len(strangers) == len(tensors):
        faults.append(Fault(where, what, f"its own are called such as {first_few(list(own))}"))
    if faults:
        raise ModelError.of(faults)
    if strangers:
        log.note(f"{where}: {what}")
    module.load_state_dict(dict(tensors), strict=False)


def changed(before: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The tensors of the network that are no longer what they were."""
    now = module.state_dict()
    return {name: tensor for name, tensor in now.items() if not torch.equal(tensor, before[name])}


def save(module: nn.Module, folder: Path, section: ModelSection | None) -> None:
    """Write model.safetensors and a config.json that names the class.

    Raises:
        StorageError: If the disk is full or the folder cannot be written.
    """
    # Tied tensors are written under each of their names, so that whoever reads them back finds all.
    write_tensors({name: tensor.clone() for name, tensor in module.state_dict().items()}, folder / WEIGHTS)
    said = {} if section is None else {"use": section.use, "arguments": section.arguments}
    config = {"architectures": [type(module).__name__], **said}
    write_json(folder / CONFIG, config)
