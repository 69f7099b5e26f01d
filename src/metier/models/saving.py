"""Write a model so that plain transformers reads it back, or the family that it belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from metier.core import files
from metier.models import plain
from metier.models.silence import quiet

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from metier.models.model import Model
    from metier.recipe import ModelSection


def save(model: Model, folder: Path, section: ModelSection | None = None) -> None:
    """Write the whole model to `folder`: config.json, model*.safetensors, and what reads text for it, if it does.

    Args:
        model: The model.
        folder: Where it goes.
        section: What the recipe says of it; only networks of a user's own need it.

    Raises:
        StorageError: If the disk is full or the folder cannot be written.
    """
    from safetensors import SafetensorError

    module: Any = model.module
    if model.tokenizer is None:
        plain.save(module, folder, section)
        return
    try:
        files.make_folder(folder)
        with quiet():
            module.save_pretrained(folder)
    except SafetensorError as error:
        raise files.storage_error(folder, OSError(str(error))) from error
    except OSError as error:
        raise files.storage_error(folder, error) from error
    save_tokenizer(model, folder)


def tokenizer_of(model: Model) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that reads text."""
    if model.tokenizer is None:
        raise AssertionError(f"{model.lineage.source} reads no text")
    return model.tokenizer


def save_tokenizer(model: Model, folder: Path) -> None:
    """Write the tokenizer and, where there is one, its chat_template.jinja.

    Raises:
        StorageError: If the disk is full or the folder cannot be written.
    """
    try:
        files.make_folder(folder)
        with quiet():
            tokenizer_of(model).save_pretrained(folder)
    except OSError as error:
        raise files.storage_error(folder, error) from error
