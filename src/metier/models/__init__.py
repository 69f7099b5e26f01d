"""Pretrained models, safely in and out: from the Hub, a folder, a GGUF file, or the demo's package."""

from metier.models.configuration import describe, describe_head
from metier.models.identity import fingerprint
from metier.models.loading import load, load_tokenizer
from metier.models.model import Head, Lineage, Model
from metier.models.saving import save, save_tokenizer
from metier.models.shape import LinearShape, Shape

__all__ = [
    "Head",
    "Lineage",
    "LinearShape",
    "Model",
    "Shape",
    "describe",
    "describe_head",
    "fingerprint",
    "load",
    "load_tokenizer",
    "save",
    "save_tokenizer",
]
