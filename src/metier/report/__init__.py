"""What a run measured, for people and for programs: a page, a model card, a file of figures, a few lines of text.

Nothing is computed here that was not measured: the report draws `Evidence`, and says where there is none.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from metier.core.comparison import Comparison, Interference
from metier.core.evidence import Evidence
from metier.core.files import write_json, write_text
from metier.report.schema import json_schema
from metier.report.verdict import verdict
from metier.report.voice import Voice, plain
from metier.report.words import Language

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "Language",
    "Voice",
    "compare_table",
    "experiment_table",
    "experiment_verdict",
    "interference_verdict",
    "json_schema",
    "plain",
    "summary",
    "verdict",
    "write",
    "write_comparison",
    "write_experiment",
    "write_interference",
]


def write(
    folder: Path,
    evidence: Evidence,
    *,
    curves: Sequence[Mapping[str, Any]],
    environment: Mapping[str, Any],
    recipe_yaml: str,
    language: Language = "en",
    license: str | None = None,  # noqa: A002
) -> Path:
    """Write evidence.json, README.md (a Hub model card) and report.html into the run folder.

    Args:
        folder: The run folder; whether it holds `adapter/` decides how the card says the result is loaded.
        evidence: Everything the run measured.
        curves: The lines of metrics.jsonl: steps and validations.
        environment: Versions and machine, as plain values.
        recipe_yaml: The resolved recipe.
        language: Of the page and the card.
        license: Named in the card; None names none.

    Returns:
        The path of report.html.

    Raises:
        StorageError: If the disk is full or the folder cannot be written.
    """
    from metier.report.card import card
    from metier.report.page import report_page

    voice = Voice(language)
    page = report_page(evidence, lines=curves, environment=environment, recipe_yaml=recipe_yaml, voice=voice)
    write_json(folder / "evidence.json", _json(evidence.model_dump()))
    write_text(folder / "README.md", card(evidence, folder=folder, voice=voice, licence=license))
    write_text(folder / "report.html", page)
    return folder / "report.html"


def write_comparison(
    folder: Path,
    evidences: Sequence[tuple[str, Evidence]],
    verdict: Sequence[str],
    language: Language = "en",
    *,
    reports: Mapping[str, Path] | None = None,
) -> Path:
    """Write comparison.html: several runs on the same base side by side.

    Args:
        folder: Where the page is written.
        evidences: Name and evidence of each run, at least one; names are what a reader sees.
        verdict: Sentences a busy person reads, first the answer.
        language: Of the page.
        reports: Path of each run's report.html by name; where none is given, `folder/<name>/report.html`. A report
            that does not exist is not linked.

    Returns:
        The path of comparison.html.

    Raises:
        StorageError: If the disk is full or the folder cannot be written.
    """
    from metier.report.page import comparison_page

    known = {label: folder / label / "report.html" for label, _ in evidences} | dict(reports or {})
    links = {
        label: quote(Path(os.path.relpath(path, folder)).as_posix()) for label, path in known.items() if path.is_file()
    }
    path = folder / "comparison.html"
    write_text(path, comparison_page(evidences, links, verdict, Voice(language)))
    return path


def write_experiment(
    folder: Path, comparison: Comparison, language: Language = "en", *, environment: Mapping[str, Any] | None = None
) -> Path:
    """Write comparison.json and comparison.html: what an experiment with several ways to tune found.

    Args:
        folder: Where both are written.
        comparison: All of it; without a verdict, its figures give one.
        language: Of the page, and of the verdict that is made here.
        environment: Versions and machine, as plain values.

    Returns:
        The path of comparison.html.

    Raises:
        StorageError: If the disk is full or the folder cannot be written.
    """
    from metier.report.experiment import View, experiment_page

    told = comparison.verdict or experiment_verdict(comparison, language)
    found = comparison.model_copy(update={"verdict": told})
    page = experiment_page(View(found, Voice(language)), environment or {})
    write_json(folder / "comparison.json", _json(found.model_dump()))
    write_text(folder / "comparison.html", page)
    return folder / "comparison.html"


def experiment_verdict(comparison: Comparison, language: Language = "en") -> tuple[str, ...]:
    """What an experiment found in three lines: the answer, the amounts, the conditions."""
    from metier.report.experiment import View, finding

    return finding(View(comparison, Voice(language)))


def experiment_table(comparison: Comparison, language: Language = "en") -> Table:
    """Base, cheap ways and arms as a rich table: figure, gain, what was kept, rate, cost."""
    from metier.report.experiment import View, table

    return table(View(comparison, Voice(language)))


def write_interference(
    folder: Path, found: Interference, language: Language = "en", *, environment: Mapping[str, Any] | None = None
) -> Path:
    """Write interference.json and interference.html: what each way to hold several tasks does to each.

    Args:
        folder: Where both are written.
        found: All of it.
        language: Of the page.
        environment: Versions and machine, as plain values.

    Returns:
        The path of interference.html.

    Raises:
        StorageError: If the disk is full or the folder cannot be written.
    """
    from metier.report.experiment import interference_page

    page = interference_page(found, Voice(language), environment or {})
    write_json(folder / "interference.json", _json(found.model_dump()))
    write_text(folder / "interference.html", page)
    return folder / "interference.html"


def interference_verdict(found: Interference, language: Language = "en") -> tuple[str, ...]:
    """What each way to hold several tasks on one base does to them."""
    from metier.report.held import held

    return held(found, Voice(language))


def summary(evidence: Evidence, language: Language = "en") -> str:
    """The verdict and a small aligned table, as plain text for a terminal."""
    from metier.report import terminal

    return terminal.summary(evidence, Voice(language))


def compare_table(
    columns: Sequence[tuple[str, Evidence]], language: Language = "en", *, measures: Sequence[str] | None = None
) -> Table:
    """Base and runs side by side as a rich table: measures, cost, and what the baselines reach.

    Args:
        columns: Name and evidence of each run, at least one.
        language: Of the words.
        measures: Names of the measures to show; None shows all.
    """
    from metier.report import terminal

    return terminal.compare_table(columns, Voice(language), measures)


def _json(value: Any) -> Any:
    """JSON has no infinity: it is written as text that `Evidence` reads back as the number."""
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"inf": "Infinity", "-inf": "-Infinity"}.get(str(value), "NaN")
    return value
