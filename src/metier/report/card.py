"""The run folder's README.md: a Hub model card with the measured numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from metier.core.evidence import Estimate, Evidence, Measure
from metier.report.answers import visible
from metier.report.figures import answers_numbers, interval_text
from metier.report.page import is_local, moved_share, peak_memory_bytes, per_second, percent, short_model, total_seconds
from metier.report.voice import Voice

HUB_NAMES = {"demo:smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Hub ids of the models that come inside packages. Source: the packages' own metadata."""
PIPELINES = {
    "chat": "text-generation",
    "complete": "text-generation",
    "classify": "text-classification",
    "cells": "tabular-regression",
    "own": "tabular-regression",
}
"""The Hub's word for a task. Source: huggingface.co/tasks."""
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HAN = re.compile(r"[\u4e00-\u9fff]")
_KANA = re.compile(r"[\u3040-\u30ff]")
_ENGLISH = frozenset(
    [
        "the",
        "a",
        "an",
        "to",
        "of",
        "and",
        "is",
        "in",
        "i",
        "my",
        "for",
        "it",
        "you",
        "that",
        "on",
        "with",
        "have",
        "not",
        "be",
        "this",
        "are",
        "was",
    ]
)


def card(evidence: Evidence, *, folder: Path, voice: Voice, licence: str | None) -> str:
    """The whole card: YAML front matter, then what was measured, how, how to load it, what it cost, limits."""
    front = yaml.safe_dump(metadata(evidence, folder, licence), allow_unicode=True, sort_keys=False, width=1000)
    model = short_model(evidence.setting.model)
    title = voice.say("card_title", name=folder.name, model=model)
    task, method = evidence.setting.task, evidence.setting.method
    sections = [
        [f"# {_plain(title)}", _plain(voice.say("card_intro", model=model, task=task, method=method))],
        [_plain(sentence) for sentence in evidence.verdict],
        [f"## {voice.say('card_measures')}", measures_table(evidence, voice), _coverage(evidence, voice)],
        _baselines(evidence, voice),
        [f"## {voice.say('card_how')}", *_how(evidence, voice)],
        [f"## {voice.say('card_load')}", *_load(evidence, folder, voice)],
        [f"## {voice.say('card_cost')}", _cost(evidence, voice)],
        [f"## {voice.say('card_limits')}", _limits(evidence, voice)],
    ]
    return f"---\n{front}---\n\n" + "\n\n".join(part for section in sections for part in section if part) + "\n"


def metadata(evidence: Evidence, folder: Path, licence: str | None) -> dict[str, Any]:
    """The card's front matter. Source: huggingface.co/docs/hub/model-cards (model card metadata)."""
    adapter = has_adapter(folder)
    numbers = answers_numbers(evidence)
    # What networks of numbers begin from is never a model on the Hub, and their rows are in no language.
    base = None if numbers else hub_name(evidence.setting.model)
    texts = (text for a in evidence.answers for text in (a.prompt, a.reference))
    language = None if numbers else language_of(texts)
    facts = {
        "base_model": base,
        "base_model_relation": ("adapter" if adapter else "finetune") if base else None,
        "library_name": "metier" if numbers else "peft" if adapter else "transformers",
        "pipeline_tag": PIPELINES.get(evidence.setting.task),
        "license": licence,
        "language": [language] if language else None,
        "tags": ["metier", *_method_tags(evidence.setting.method, adapter=adapter), evidence.setting.task],
        "model-index": [_index(evidence, folder)],
    }
    return {key: value for key, value in facts.items() if value is not None}


def has_adapter(folder: Path) -> bool:
    """Whether the run's result is an adapter in peft's format."""
    return (folder / "adapter").is_dir()


def hub_name(model: str) -> str | None:
    """The base's Hub id; None for a local place, whose name says nothing to others."""
    if model in HUB_NAMES:
        return HUB_NAMES[model]
    return model if _HUB_ID.fullmatch(model) and not is_local(model) else None


def language_of(texts: Iterable[str]) -> str | None:
    """English or Chinese where the texts plainly are, else None: a card should not guess.

    Chinese: a third of the letters are Han characters and none is kana. English: a tenth of the words are among its
    commonest; no other language written in Latin letters comes near.
    """
    text = " ".join(texts)
    letters = sum(character.isalpha() for character in text)
    if letters and len(_HAN.findall(text)) > letters / 3:
        return None if _KANA.search(text) else "zh"
    words = re.findall(r"[a-z']+", text.lower())
    return "en" if len(words) >= 5 and sum(word in _ENGLISH for word in words) > len(words) / 10 else None


def measures_table(evidence: Evidence, voice: Voice) -> str:
    """The measures as a Markdown table."""
    heads = [voice.say(key) for key in ("measure", "base", "tuned", "change", "verdict")]
    rows = [
        [
            f"{voice.measure(m)}{' (nats)' if m.unit == 'nats' else ''} {'↑' if m.higher_is_better else '↓'}",
            _estimate(m.before, m, voice),
            _estimate(m.after, m, voice),
            _change(m, voice),
            voice.say(m.verdict),
        ]
        for m in evidence.measures
    ]
    return _table(heads, rows)


def _index(evidence: Evidence, folder: Path) -> dict[str, Any]:
    results = [
        _result(evidence, [m for m in evidence.measures if m.group == "domain"], "held-out rows of the run's own data"),
        _result(evidence, [m for m in evidence.measures if m.group == "retention"], "general material for retention"),
    ]
    return {"name": folder.name or evidence.setting.task, "results": [result for result in results if result]}


def _result(evidence: Evidence, measures: Sequence[Measure], dataset: str) -> dict[str, Any] | None:
    if not measures:
        return None
    pipeline = PIPELINES.get(evidence.setting.task, evidence.setting.task)
    kind = "private" if measures[0].group == "domain" else "metier-retention"
    facts = {"name": dataset, "type": kind, "split": "test"}
    return {
        "task": {"type": pipeline, "name": evidence.setting.task},
        "dataset": facts,
        "metrics": [_metric(measure, evidence.setting.confidence) for measure in measures],
    }


def _metric(measure: Measure, confidence: float) -> dict[str, Any]:
    """The Hub has no field for an interval, so it stands in the metric's name, where the Hub shows it."""
    english = Voice("en")
    interval = interval_text(measure.after, measure.unit, english)
    said = f"{english.coverage(confidence)} interval {interval}" if measure.after.n > 1 else interval
    name = f"{measure.title} ({said}; n = {measure.after.n:,})"
    return {"type": measure.name, "name": name, "value": float(f"{measure.after.value:.6g}"), "verified": False}


def _method_tags(method: str, *, adapter: bool) -> list[str]:
    word = re.split(r"[^A-Za-z]", method.strip(), maxsplit=1)[0].lower()
    tags = [tag for tag in ("lora", "rslora", "dora", "freeze") if tag == word]
    return tags or (["lora"] if adapter else ["full-fine-tuning"])


def _coverage(evidence: Evidence, voice: Voice) -> str:
    return voice.say("card_table_note", coverage=voice.coverage(evidence.setting.confidence))


def _baselines(evidence: Evidence, voice: Voice) -> list[str]:
    if not evidence.baselines:
        return []
    measures = {measure.name: measure for measure in evidence.measures}
    lines = []
    for baseline in evidence.baselines:
        figures = [
            f"{voice.measure(measures[f.name])} {_estimate(f.estimate, measures[f.name], voice)}"
            for f in baseline.figures
            if f.name in measures
        ]
        reached = f"{voice.baseline(baseline)}: {', '.join(figures) or '–'} ({voice.baseline_how(baseline)})"
        lines.append(f"- {_plain(reached)}")
    return [voice.say("card_baselines"), "\n".join(lines)]


def _how(evidence: Evidence, voice: Voice) -> list[str]:
    s, cost = evidence.setting, evidence.cost
    rows = voice.say(
        "data_rows",
        train=voice.count(s.rows_train),
        validation=voice.count(s.rows_validation),
        test=voice.count(s.rows_test),
        measured=voice.count(s.rows_measured),
    )
    training = voice.say(
        "card_training",
        steps=cost.steps,
        best=cost.best_step,
        rate=f"{s.learning_rate:g}",
        reason=s.learning_rate_reason,
    )
    return [
        _plain(voice.say("card_rows", rows=rows, format=s.data_format, fingerprint=s.data_fingerprint)),
        _plain(training),
        voice.say("card_seed", seed=s.seed, command=evidence.command.replace("`", "'").replace("\n", " ")),
        "\n".join(f"- {_plain(note)}" for note in evidence.notes),
    ]


def _load(evidence: Evidence, folder: Path, voice: Voice) -> list[str]:
    where = json.dumps(folder.name or ".", ensure_ascii=False)
    if answers_numbers(evidence):
        return _load_numbers(evidence, folder, where, voice)
    own = f'import metier\n\nspecialist = metier.load({where})\nprint(specialist.predict(["..."])[0])'
    notes = [voice.say("card_adapter")] if has_adapter(folder) else []
    if hub_name(evidence.setting.model) is None:
        notes.append(voice.say("card_local_base"))
    snippet = _adapter_snippet if has_adapter(folder) else _transformers_snippet
    blocks = (f"```python\n{code}\n```" for code in (snippet(folder, where), own))
    return [" ".join(notes), *blocks]


def _load_numbers(evidence: Evidence, folder: Path, where: str, voice: Voice) -> list[str]:
    """Networks of numbers are metier's or the user's own, so no other library loads them."""
    cells = evidence.setting.task == "cells"
    rows = "adata" if cells else "rows"
    notes = [voice.say("card_predict_cells" if cells else "card_predict_own")]
    if has_adapter(folder):
        notes.append(voice.say("card_adapter"))
    code = f"import metier\n\nspecialist = metier.load({where})\nspecialist.predict({rows})"
    return [("" if voice.language == "zh" else " ").join(notes), f"```python\n{code}\n```"]


def _adapter_snippet(folder: Path, where: str) -> str:
    auto = f"AutoPeftModelFor{_head(folder)}"
    classes = _class_count(folder)
    extra = f", num_labels={classes}" if classes else ""
    return (
        f"from peft import {auto}\nfrom transformers import AutoTokenizer\n\nfolder = {where}\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        f'model = {auto}.from_pretrained(f"{{folder}}/adapter"{extra})'
    )


def _transformers_snippet(folder: Path, where: str) -> str:
    auto = f"AutoModelFor{_head(folder)}"
    return (
        f"from transformers import AutoTokenizer, {auto}\n\nfolder = {where}\n"
        f"tokenizer = AutoTokenizer.from_pretrained(folder)\nmodel = {auto}.from_pretrained(folder)"
    )


def _head(folder: Path) -> str:
    """Which Auto class reads the result, by what the saved files say of themselves."""
    adapter = _read_json(folder / "adapter" / "adapter_config.json").get("task_type")
    architectures = _read_json(folder / "config.json").get("architectures") or [""]
    said = f"{adapter or ''} {architectures[0]}"
    if "SEQ_CLS" in said or "ForSequenceClassification" in said:
        return "SequenceClassification"
    return "Seq2SeqLM" if "SEQ_2_SEQ_LM" in said or "ForConditionalGeneration" in said else "CausalLM"


def _class_count(folder: Path) -> int | None:
    """Rows of the new head inside an adapter, which plain peft must be told; None where there is no such head."""
    weights = folder / "adapter" / "adapter_model.safetensors"
    if _head(folder) != "SequenceClassification" or not weights.is_file():
        return None
    from safetensors import safe_open

    with safe_open(weights, framework="np") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    heads = [shape[0] for name, shape in sorted(shapes.items()) if "lora_" not in name and len(shape) == 2]
    return int(heads[-1]) if heads else None


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else {}


def _cost(evidence: Evidence, voice: Voice) -> str:
    cost = evidence.cost
    share = percent(moved_share(evidence))
    moved = f"{voice.count(cost.parameters_moved)} / {voice.count(cost.parameters_total)} ({share})"
    rows = [
        [voice.say("tile_time"), voice.seconds(total_seconds(evidence))],
        *([f"– {voice.phase(phase.name)}", voice.seconds(phase.wall_seconds)] for phase in cost.phases),
        [voice.say("memory"), voice.size(peak_memory_bytes(evidence))],
        [voice.say("parameters_moved"), moved],
        [voice.say("bytes_on_disk"), voice.size(cost.bytes_on_disk)],
        [
            voice.say(per_second(numbers=answers_numbers(evidence))),
            voice.count(round(cost.tokens_per_second)),
        ],
    ]
    return _table(["", voice.say("card_cost")], rows)


def _limits(evidence: Evidence, voice: Voice) -> str:
    kept = [measure for measure in evidence.measures if measure.group == "retention" and measure.change is not None]
    worse = [voice.measure(measure) for measure in kept if measure.verdict == "worse"]
    if not kept:
        retention = voice.say("card_limit_no_retention")
    elif worse:
        retention = voice.say("card_limit_worse", titles=", ".join(worse))
    else:
        retention = voice.say("card_limit_no_worse")
    lines = [
        retention,
        voice.say("card_limit_rows", n=voice.count(evidence.setting.rows_measured)),
        voice.say("card_limit_seed", seed=evidence.setting.seed),
        voice.say("card_limit_safety"),
    ]
    return "\n".join(f"- {_plain(line)}" for line in lines)


def _estimate(estimate: Estimate | None, measure: Measure, voice: Voice) -> str:
    if estimate is None:
        return "–"
    return f"{voice.amount(estimate.value, measure.unit)} [{interval_text(estimate, measure.unit, voice)}]"


def _change(measure: Measure, voice: Voice) -> str:
    if measure.change is None:
        return "–"
    interval = interval_text(measure.change, measure.unit, voice, signed=True)
    return f"{voice.change(measure.change.value, measure.unit)} [{interval}]"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|")


def _plain(text: str) -> str:
    """One line of Markdown in which nothing of the text is read as a tag."""
    return " ".join(visible(text).split()).replace("<", "&lt;")
