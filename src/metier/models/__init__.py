"""Pretrained models, safely in and out: of text, of cells, and a user's own."""

from metier.models.chat_template import render_chat
from metier.models.configuration import describe, describe_head, skeleton
from metier.models.identity import fingerprint
from metier.models.inspecting import Inspected, inspect
from metier.models.loading import load, load_tokenizer
from metier.models.model import Head, Lineage, Model
from metier.models.own import called, changed, fill, in_their_code, read_weights, source_digest
from metier.models.plain import (
    NEW_CELLS,
    is_blank,
    known_genes,
    known_proteins,
    load_cells,
    load_own,
    retarget,
    usual_transform,
)
from metier.models.saving import save, save_tokenizer, tokenizer_of
from metier.models.sctranslator import ScTranslator, export_original
from metier.models.shape import LinearShape, Shape
from metier.models.tensors import blocks, write_tensors

__all__ = [
    "NEW_CELLS",
    "Head",
    "Inspected",
    "Lineage",
    "LinearShape",
    "Model",
    "ScTranslator",
    "Shape",
    "blocks",
    "called",
    "changed",
    "describe",
    "describe_head",
    "export_original",
    "fill",
    "fingerprint",
    "in_their_code",
    "inspect",
    "is_blank",
    "known_genes",
    "known_proteins",
    "load",
    "load_cells",
    "load_own",
    "load_tokenizer",
    "read_weights",
    "render_chat",
    "retarget",
    "save",
    "save_tokenizer",
    "skeleton",
    "source_digest",
    "tokenizer_of",
    "usual_transform",
    "write_tensors",
]
