"""Names of genes and proteins: which kind of id they are, what they are called, and how many of them a model knows.

G stands for genes, P for proteins.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from metier.core import DataError
from metier.core.panel import Panel
from metier.data.cells.parts import Frame, Words, words
from metier.data.faults import Faults, count, listed, nearest, refuse

Kind = Literal["Ensembl ids", "Entrez ids", "symbols", "unknown names"]
Organism = Literal["human", "mouse", "another organism", "unknown"]

ENSEMBL = re.compile(r"ENS([A-Z]{3})?G\d{6,}(\.\d+)?(_PAR_Y)?$")
VERSION = re.compile(r"(ENS[A-Z]*G\d+)\.\d+$")
HUMAN_SYMBOL = re.compile(r"[A-Z][A-Z0-9.\-]*(orf[A-Z0-9.\-]+)?$")
MOUSE_SYMBOL = re.compile(r"([A-Z][a-z]+[A-Za-z0-9.\-]*|H2-[A-Z][a-z0-9]*|[A-Z]?\d{4,}[A-Z]\d{2}Rik)$")
MOST = 0.5
"""Share of names of one look from which all are taken to be of that kind."""
LEAST_OVERLAP = 0.6
"""Share of names that a model must know, unless told otherwise."""
SYMBOL_COLUMNS = (
    "gene_symbols",
    "gene_symbol",
    "symbol",
    "symbols",
    "gene_name",
    "gene_names",
    "feature_name",
    "hgnc_symbol",
    "gene_short_name",
)
ID_COLUMNS = ("gene_ids", "gene_id", "ensembl_id", "ensembl_ids", "ensembl", "feature_id", "feature_ids")
MODEL_ID_COLUMN = "my_Id"
NAME_WORDS = ("name", "symbol", "gene", "protein", "hugo_symbol", "gene_symbol")
ID_WORDS = ("id", "my_id")


@dataclass(frozen=True, slots=True)
class Look:
    """What names look like.

    Attributes:
        kind: Kind of id.
        organism: Whose genes they are, as far as the look tells.
    """

    kind: Kind
    organism: Organism


def look_of(names: Collection[str]) -> Look:
    """Recognise the names of genes by how most of them are written."""
    total = max(1, len(names))
    ensembl = Counter(match[1] or "" for name in names if (match := ENSEMBL.match(name)))
    if ensembl.total() > MOST * total:
        organisms: dict[str, Organism] = {"": "human", "MUS": "mouse"}
        return Look("Ensembl ids", organisms.get(ensembl.most_common(1)[0][0], "another organism"))
    if sum(name.isascii() and name.isdigit() for name in names) > MOST * total:
        return Look("Entrez ids", "unknown")
    if sum(bool(HUMAN_SYMBOL.match(name)) for name in names) > MOST * total:
        return Look("symbols", "human")
    if sum(bool(MOUSE_SYMBOL.match(name)) for name in names) > MOST * total and not _numbered(names):
        return Look("symbols", "mouse")
    return Look("unknown names", "unknown")


def _numbered(names: Collection[str]) -> bool:
    """Whether the names are one word with numbers, such as Gene1, Gene2."""
    stems = Counter(name.rstrip("0123456789") for name in names)
    return stems.most_common(1)[0][1] > MOST * len(names)


def repeated(names: Words) -> list[str]:
    """Names that stand more than once, in alphabetical order."""
    found, numbers = np.unique(names, return_counts=True)
    return [str(name) for name in found[numbers > 1]]


def gene_names(var: Frame, where: str, column: str | None, organism: str | None, faults: Faults) -> tuple[Words, str]:
    """The name of each gene and a note on how it was found; what is wrong is added to `faults`."""
    ids, look = var.names, look_of(var.names.tolist())
    if not len(ids):
        faults.add("no genes", where, "has no genes", "give a matrix of cells x genes")
        return ids, ""
    if look.kind == "Entrez ids" and np.array_equal(ids, np.arange(len(ids)).astype(np.str_)):
        what = f"the {len(ids):,} genes have no names, only their numbers 0 to {len(ids) - 1:,}"
        faults.add("no names", where, what, "set adata.var_names to gene symbols or Ensembl ids")
        return ids, ""
    symbols, note = _symbols(var, look, where, column, faults)
    look = look if look.kind == "Ensembl ids" else look_of(symbols.tolist())
    _check_organism(look, symbols, where, organism, faults)
    return _unique(symbols, var, where, note or f"{len(ids):,} genes, named by {look.kind}", faults)


def _symbols(var: Frame, look: Look, where: str, column: str | None, faults: Faults) -> tuple[Words, str]:
    """Symbols where they are known, else the names as they stand."""
    ids = var.names
    if column is not None and column not in var.columns:
        near = nearest(column, var.columns)
        hint = f"did you mean {near}?" if near else f"var has {listed(var.columns) or 'no columns'}"
        faults.add("no symbols", where, f"var has no column {column!r}, which data.columns.symbols names", hint)
        return ids, ""
    if column is None and look.kind in {"Ensembl ids", "Entrez ids"}:
        column = next((name for name in SYMBOL_COLUMNS if name in var.columns), None)
    if column is not None:
        found = words(var.get(column))
        return np.where(found == "", ids, found), f"{len(ids):,} genes: {look.kind}, symbols from var[{column!r}]"
    bare = np.array([VERSION.sub(r"\1", name) for name in ids.tolist()], dtype=np.str_)
    if look.kind == "Ensembl ids" and (bare != ids).any() and len(np.unique(bare)) == len(ids):
        return bare, f"{len(ids):,} genes: Ensembl ids, read without their version (.5)"
    return ids, ""


def _check_organism(look: Look, names: Words, where: str, organism: str | None, faults: Faults) -> None:
    if organism in {None, look.organism} or look.organism == "unknown":
        return
    what = f"the genes are {look.organism}'s by their look ({listed(names.tolist(), 4)}), the model's are {organism}'s"
    hint = f"map them to {organism} genes"
    if look.organism in {"human", "mouse"}:
        hint += f", or say that the model knows these: task.organism={look.organism}"
    faults.add("organism", where, what, hint)


def _unique(names: Words, var: Frame, where: str, note: str, faults: Faults) -> tuple[Words, str]:
    """Names without repeats: where only symbols repeat, the first keeps the symbol and the others take their id."""
    if (names == "").any():
        what = f"{count(int((names == '').sum()), 'gene')} without a name"
        faults.add("nameless", where, what, "name every gene in adata.var_names")
    again = repeated(names)
    if not again:
        return names, note
    candidates = [var.names, *(words(var.get(name)) for name in ID_COLUMNS if name in var.columns)]
    for ids in candidates:
        later = np.ones(len(names), bool)
        later[np.unique(names, return_index=True)[1]] = False
        renamed = np.where(later, ids, names)
        if "" not in ids and not repeated(ids) and not repeated(renamed):
            said = f"{count(len(again), 'symbol stands', 'symbols stand')} for several genes ({listed(again, 4)})"
            return renamed, f"{note}; {said}: the first keeps the symbol, the others are called by their id"
    what = f"{count(len(again), 'gene name stands', 'gene names stand')} more than once: {listed(again, 6)}"
    faults.add("repeated", where, what, "adata.var_names_make_unique() tells them apart; or sum their counts")
    return names, note


def protein_names(var: Frame, where: str, faults: Faults) -> Words:
    """The name of each protein; what is wrong is added to `faults`."""
    names = var.names
    if not len(names):
        faults.add("no proteins", where, "has no proteins: the panel is empty", "give a matrix of cells x proteins")
    elif again := repeated(names):
        what = f"{count(len(again), 'protein name stands', 'protein names stand')} more than once: {listed(again, 6)}"
        faults.add("repeated", where, what, "name the clones apart: proteins.var_names_make_unique()")
    elif np.array_equal(names, np.arange(len(names)).astype(np.str_)):
        what = f"the {len(names):,} proteins have no names, only their numbers"
        faults.add("no names", where, what, "set proteins.var_names")
    return names


def model_ids(
    var: Frame, names: Words, where: str, given: str | None, word: str, faults: Faults
) -> tuple[tuple[int, ...], str]:
    """The published network's id of each gene or protein, 0 for none, and a note; nothing where no id is known.

    `given` names a column of var or a table of names and ids; by default the column is `my_Id`.
    """
    column = given or MODEL_ID_COLUMN
    if column in var.columns:
        return _ids_of_column(var.get(column), where, column, faults)
    if given is None:
        return (), ""
    if not Path(given).is_file():
        near = nearest(given, var.columns)
        what = f"{given!r}, which data.columns.{word} names, is neither a column of var nor a file"
        faults.add(
            "no ids", where, what, f"did you mean {near}?" if near else f"var has {listed(var.columns) or 'none'}"
        )
        return (), ""
    try:
        table = read_id_table(given)
    except DataError as error:
        for fault in error.faults:
            faults.add("table of ids", fault.where, fault.what, fault.hint)
        return (), ""
    found = tuple(table.get(name, 0) for name in names.tolist())
    known = sum(number > 0 for number in found)
    lost = [name for name, number in zip(names.tolist(), found, strict=True) if not number]
    missing = f"; without: {listed(lost, 5)}" if lost else ""
    return found, f"{known:,} of {len(names):,} names have an id in {given}{missing}"


def _ids_of_column(values: Any, where: str, column: str, faults: Faults) -> tuple[tuple[int, ...], str]:
    """Whole numbers out of a column that may hold text, floats and gaps."""
    texts = [text.removesuffix(".0") for text in words(values).tolist()]
    wrong = [text for text in texts if text and not _whole(text)]
    if wrong:
        what = f"var[{column!r}] holds {count(len(wrong), 'value')} that {'is' if len(wrong) == 1 else 'are'} no id: "
        hint = "ids are whole numbers from 1, 0 or empty for none"
        faults.add("ids", where, what + listed(wrong, 4), hint)
        return (), ""
    found = tuple(int(text or 0) for text in texts)
    return found, f"ids from var[{column!r}]: {sum(number > 0 for number in found):,} of {len(found):,}"


def _whole(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 18


def read_id_table(file: str | Path) -> dict[str, int]:
    """Id by name, out of a CSV or TSV file of two columns, with or without a header.

    Raises:
        DataError: With every line that is wrong.
    """
    where, faults = str(file), Faults(str(file))
    try:
        lines = Path(file).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        said = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise DataError(f"cannot be read: {said}", where=where, hint="give a CSV or TSV file: name,id") from error
    rows = list(csv.reader(lines, delimiter="\t" if lines and "\t" in lines[0] else ","))
    name_at, id_at, start = _table_columns(rows)
    found: dict[str, int] = {}
    for number, row in enumerate(rows[start:], start + 1):
        if not any(cell.strip() for cell in row):
            continue
        name, text = (row[at].strip() if at < len(row) else "" for at in (name_at, id_at))
        if not name or not _whole(text):
            faults.add("no id", f"{where}:{number}", f"{','.join(row)[:60]!r} is no name and id", "such as CD3E,1234")
        elif found.setdefault(name, int(text)) != int(text):
            faults.add(
                "two ids", f"{where}:{number}", f"{name} has another id, {found[name]}, above", "keep one of them"
            )
    if faults:
        raise DataError.of(faults.shown())
    if not found:
        raise DataError("holds no name and id", where=where, hint="one line for each name: name,id")
    return found


def _table_columns(rows: Sequence[Sequence[str]]) -> tuple[int, int, int]:
    """Where names and ids stand, and the first row that is no header."""
    head = [cell.strip().lower() for cell in rows[0]] if rows else []
    if any(_whole(cell) for cell in head) or not head:
        return 0, 1, 0
    name_at = next((head.index(word) for word in NAME_WORDS if word in head), 0)
    return name_at, next((head.index(word) for word in ID_WORDS if word in head), 1), 1


def overlap(
    panel: Panel,
    vocabulary: Collection[str],
    *,
    at_least: float = LEAST_OVERLAP,
    what: Literal["genes", "proteins"] = "genes",
    where: str = "data",
) -> str:
    """How many names of a panel a model knows, as a note.

    What counts is the larger of two shares: how much of the panel is known, and how much of what is known is there. So
    a whole transcriptome does for a network of some thousand genes, and so does a part of them.

    Args:
        panel: The table's panel.
        vocabulary: The names that the model knows.
        at_least: The share that is enough.
        what: Which axis of the panel.
        where: The file, for the message.

    Raises:
        DataError: If fewer are known, with the likely reason.
    """
    names: tuple[str, ...] = getattr(panel, what)
    known = vocabulary if isinstance(vocabulary, set | frozenset | Mapping) else set(vocabulary)
    lost = [name for name in names if name not in known]
    there = len(names) - len(lost)
    share = max(there / max(1, len(names)), there / max(1, len(known)))
    said = f"{there:,} of {len(names):,} {what} ({there / max(1, len(names)):.0%}) are known to the model"
    if known and there / len(known) > there / max(1, len(names)):
        said += f", {there / len(known):.0%} of those that it knows"
    if names and share >= at_least:
        return f"{said}; unknown: {listed(lost, 5)}." if lost else f"{said}."
    hint = f"task.overlap={max(0.0, int(share * 100) / 100)} goes on without the others"
    raise DataError(
        f"{said}, fewer than {at_least:.0%}; unknown: {listed(lost, 5)}",
        where=where,
        hint=f"{_reason(names, known)}; {hint}",
    )


def check_ids(panel: Panel, *, at_least: float = LEAST_OVERLAP, where: str = "data") -> None:
    """Most genes must have an id of the published network, and no two the same.

    Raises:
        DataError: If not.
    """
    ids = [number for number in panel.gene_ids if number]
    faults = Faults(where)
    if len(ids) < at_least * len(panel.genes):
        what = f"{len(ids):,} of {len(panel.genes):,} genes have an id, fewer than {at_least:.0%}"
        share = int(100 * len(ids) / len(panel.genes)) / 100
        hint = f"name a table of ids: data.columns={{gene_ids: FILE}}; task.overlap={share} goes on without the others"
        faults.add("ids", where, what, hint)
    if again := sorted(number for number, times in Counter(ids).items() if times > 1):
        twice = [name for name, number in zip(panel.genes, panel.gene_ids, strict=False) if number == again[0]]
        what = f"{count(len(again), 'id stands', 'ids stand')} for several genes, {again[0]} for {listed(twice, 3)}"
        faults.add("ids", where, what, "give each gene an id of its own, or 0 to leave it out")
    refuse(faults)


def _reason(names: Sequence[str], known: Collection[str]) -> str:
    """Why so few names are known, as far as the names tell."""
    have, want = look_of(names), look_of(list(known))
    if have.kind != want.kind:
        return f"the data has {have.kind}, the model knows {want.kind}: map one to the other"
    if {have.organism, want.organism} == {"human", "mouse"}:
        return f"the data is {have.organism}, the model {want.organism}: map the genes to their orthologues"
    direct = sum(name in known for name in names)
    lower, bare = {name.lower() for name in known}, {VERSION.sub(r"\1", name) for name in known}
    if sum(name.lower() in lower for name in names) > direct:
        return "many differ in upper and lower case only: write them as the model does"
    if sum(VERSION.sub(r"\1", name) in bare for name in names) > direct:
        return "many differ in the version suffix (.5) only: take it off"
    return "it may be another annotation or panel"
