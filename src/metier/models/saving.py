"""Write a model so that plain transformers reads it back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from metier.core import files
from metier.models.silence import quiet

if TYPE_CHECKING:
    from pathlib import Path

    from metier.models.model import Model


def save(model: Model, folder: Path) -> None:
    """Write the whole model to `folder`: config.json, model*.safetensors, generation_config.json, and its tokenizer.

    Raises:
        StorageError: If the disk is full or the folder cannot be written.
    """
    from safetensors import SafetensorError

    module: Any = model.module
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with quiet():
            module.save_pretrained(folder)
    except SafetensorError as error:
        raise files.storage_error(folder, OSError(str(error))) from error
    except OSError as error:
        raise files.storage_error(folder, error) from error
    save_tokenizer(model, folder)


def save_tokenizer(model: Model, folder: Path) -> None:
    """Write the tokenizer and, where there is one, its chat_template.jinja.

    Raises:
        StorageError: If the disk is full or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with quiet():
            model.tokenizer.save_pretrained(folder)
    except OSError as error:
        raise files.storage_error(folder, error) from error
