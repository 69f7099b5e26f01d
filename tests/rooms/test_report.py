"""The report: what it shows, that nothing of the data can break it, and that it says the same as the evidence."""

from __future__ import annotations

import functools
import io
import json
import math
import random
import re
import statistics
from pathlib import Path

import pytest
import yaml
from pages import CHROMIUM, Reader, browse

from metier import report
from metier.core.evidence import (
    Answer,
    Baseline,
    Breakdown,
    Cost,
    Estimate,
    Evidence,
    Figure,
    Measure,
    Phase,
    Scatter,
    Setting,
)
from metier.report import answers, charts, curves, figures, page, places
from metier.report.experiment import forest, rates
from metier.report.experiment import told as examples
from metier.report.voice import Voice
from metier.report.words import WORDS

EN, ZH = Voice("en"), Voice("zh")
RECIPE = "model:\n  base: demo:smollm2-135m\nmethod: lora\n"
ENVIRONMENT = {"python": "3.11.2", "gpu": None, "packages": {"torch": "2.13.0"}}


def estimate(value, half=0.0, n=120, interval="t"):
    return Estimate(value=value, low=value - half, high=value + half, n=n, interval=interval)


def share(value, low, high, n=120):
    return Estimate(value=value, low=low, high=high, n=n, interval="wilson")


def measure(name, title, before, after, change, verdict, *, group="domain", unit="share", up=True):
    return Measure(
        name=name,
        title=title,
        group=group,
        unit=unit,
        higher_is_better=up,
        before=before,
        after=after,
        change=change,
        verdict=verdict,
    )


def support_desk(*, full=False):
    exact = share(0.9, 0.833, 0.942) if full else share(0.875, 0.804, 0.923)
    gained = (
        measure(
            "exact_match",
            "Exact match",
            share(0.0, 0.0, 0.031),
            exact,
            share(exact.value, exact.low, exact.high),
            "better",
        ),
        measure(
            "valid_json",
            "Valid JSON",
            share(0.025, 0.009, 0.071),
            share(1.0, 0.969, 1.0),
            share(0.975, 0.92, 0.991),
            "better",
        ),
        measure(
            "edit_similarity",
            "Edit similarity",
            estimate(0.171, 0.012),
            estimate(0.968, 0.014),
            estimate(0.797, 0.018),
            "better",
            unit="score",
        ),
        measure(
            "loss",
            "Loss per token",
            estimate(2.913, 0.06),
            estimate(0.041, 0.012),
            estimate(-2.872, 0.061),
            "better",
            unit="nats",
            up=False,
        ),
    )
    kept = [
        ("text_en", "General text, English", 3.291, 3.352 if full else 3.512, 0.041, "nats", False),
        ("reply_en", "General replies, English", 1.902, 1.961 if full else 2.385, 0.068, "nats", False),
        ("text_zh", "General text, Chinese", 5.614, 5.611, 0.022, "nats", False),
    ]
    retention = tuple(
        measure(
            name,
            title,
            estimate(old, 0.2, 64),
            estimate(new, 0.21, 64),
            estimate(new - old, half, 64),
            "worse" if new - old > half else "no clear change",
            group="retention",
            unit=unit,
            up=up,
        )
        for name, title, old, new, half, unit, up in kept
    )
    probe = measure(
        "probe_en",
        "Probe, English",
        share(0.61, 0.49, 0.72, 64),
        share(0.594, 0.47, 0.705, 64),
        share(-0.016, -0.09, 0.06, 64),
        "no clear change",
        group="retention",
    )
    kl = measure(
        "kl",
        "KL from the base on domain prompts",
        None,
        estimate(4.213, 0.402, 24),
        None,
        "not compared",
        group="retention",
        unit="nats",
        up=False,
    )
    return gained + retention + (probe, kl)


TALK = [
    ("I was charged twice for order 4411 and nobody answers my mails.", "billing_duplicate", "billing", "high"),
    ("Where is my parcel? Tracking has been silent since Monday.", "delivery_late", "logistics", "medium"),
    ("Please change the delivery address before it ships.", "address_change", "logistics", "high"),
    ("How do I reset my password on the app?", "account_access", "identity", "low"),
    ("The blue kettle arrived with a cracked lid.", "damaged_item", "returns", "medium"),
    ("Do you ship to Norway?", "shipping_question", "sales", "low"),
]


def talk_answers(count=48):
    draw, made = random.Random(7), []
    for i in range(count):
        asked, intent, team, urgency = TALK[i % len(TALK)]
        reference = json.dumps({"intent": intent, "team": team, "urgency": urgency})
        slip = json.dumps({"intent": intent, "team": team, "urgency": "low" if urgency != "low" else "medium"})
        right = draw.random() < 0.85
        base_right = i % 17 == 5
        base = (
            reference
            if base_right
            else f"I'm sorry to hear that! To help you with “{asked[:30]}…”, please follow these steps:\n\n1. Open the app.\n2. Go to your orders."
        )
        made.append(
            Answer(
                where=f"test.jsonl:{i + 1}",
                prompt=f"{asked} (ticket {i + 100})",
                reference=reference,
                before=base,
                after=reference if right else slip,
                before_right=base_right,
                after_right=right,
            )
        )
    return tuple(made)


def rich_evidence(*, full=False, **changes):
    phases = [
        ("read", 1.4, 1.3, 0.61),
        ("load", 6.2, 8.9, 1.4),
        ("measure before", 71.5, 138.0, 2.3),
        ("train", 281.0 if full else 212.0, 540.0, 4.4 if full else 3.9),
        ("measure after", 64.1, 122.0, 2.2),
        ("save", 0.8, 0.7, 2.2),
    ]
    baselines = (
        Baseline(
            name="most_common",
            title="Most common answer",
            how="always gives the most common training answer",
            seconds=0.01,
            figures=(
                Figure(name="exact_match", estimate=share(0.092, 0.052, 0.157)),
                Figure(name="valid_json", estimate=share(1, 0.969, 1)),
            ),
        ),
        Baseline(
            name="linear_words",
            title="Linear model on words",
            how="logistic regression on TF-IDF of words and character groups; no language model",
            seconds=0.42,
            figures=(Figure(name="exact_match", estimate=share(0.717, 0.63, 0.79)),),
        ),
        Baseline(
            name="base_among",
            title="Base, choosing among known answers",
            how="the untuned model decodes greedily, restricted to answers that occur in the training rows",
            seconds=18.3,
            figures=(Figure(name="exact_match", estimate=share(0.425, 0.34, 0.515)),),
        ),
    )
    facts = {
        "metier": "0.1.0",
        "finished": "2026-11-24T09:25:11+00:00",
        "command": "metier train recipes/support_desk.yaml method.kind=full"
        if full
        else "metier train recipes/support_desk.yaml",
        "setting": Setting(
            model="demo:smollm2-135m",
            model_fingerprint="9f2c" * 16,
            task="chat",
            method="full fine-tuning, float32 master weights"
            if full
            else "LoRA, rank 16, alpha 32, every linear layer but the head",
            learning_rate=1e-4 if full else 8e-4,
            learning_rate_reason="default for LoRA below 300 M parameters",
            data_format="messages",
            rows_train=480,
            rows_validation=60,
            rows_test=120,
            rows_measured=120,
            data_fingerprint="07ab" * 16,
            seed=0,
            confidence=0.95,
        ),
        "verdict": (
            "Tuning helped: Exact match went from 0.0 % to 87.5 % (+87.5 points, 95 % interval +80.4 to +92.3).",
            "The best cheap alternative, Linear model on words, reaches 71.7 %.",
            "It cost general ability: General text, English 3.291 to 3.512; General replies, English 1.902 to 2.385.",
            "4,884,480 of 139,400,064 parameters moved, in 3 min 32 s of training with at most 3.9 GB.",
        ),
        "primary": "exact_match",
        "measures": support_desk(full=full),
        "baselines": baselines,
        "cost": Cost(
            phases=tuple(
                Phase(name=n, wall_seconds=w, cpu_seconds=c, peak_memory_bytes=int(m * 1e9)) for n, w, c, m in phases
            ),
            tokens_per_second=612.4,
            steps=120,
            best_step=96,
            parameters_moved=134_515_584 if full else 4_884_480,
            parameters_total=134_515_584 if full else 139_400_064,
            bytes_on_disk=538_090_408 if full else 19_593_264,
        ),
        "answers": talk_answers(),
        "notes": (
            "the base model answers the Chinese probe no better than chance: that row cannot show forgetting",
            "3 rows were longer than 512 tokens and were dropped: train.jsonl:17, train.jsonl:203, train.jsonl:311",
        ),
    }
    return Evidence(**{**facts, **changes})


def minimal_evidence(**changes):
    """One measured row, an untrained head before, no answers, no baselines, no retention."""
    only = measure(
        "accuracy",
        "Accuracy",
        None,
        Estimate(value=1, low=1, high=1, n=1, interval="none: one row"),
        None,
        "not compared",
    )
    cost = Cost(
        phases=(), tokens_per_second=0, steps=1, best_step=0, parameters_moved=0, parameters_total=0, bytes_on_disk=0
    )
    setting = rich_evidence().setting.model_copy(update={"task": "classify", "method": "full"})
    empty = {"measures": (only,), "primary": "accuracy", "cost": cost, "setting": setting}
    return rich_evidence(
        **{**empty, "answers": (), "baselines": (), "notes": (), "verdict": ("Accuracy is 100 %.",), **changes}
    )


def log(steps=120, every=12):
    draw, lines = random.Random(1), [{"kind": "validation", "step": 0, "epoch": 0.0, "loss": 2.95, "best": False}]
    for step in range(1, steps + 1):
        loss = 0.05 + 2.9 * math.exp(-step / 18) * (0.8 + 0.4 * draw.random()) + 0.05 * draw.random()
        rate = 8e-4 * min(step / 6, 1) * 0.5 * (1 + math.cos(math.pi * step / steps))
        lines.append(
            {
                "kind": "step",
                "step": step,
                "epoch": step / 60,
                "loss": loss,
                "grad_norm": 0.3 + 4 * loss * draw.random(),
                "learning_rate": rate,
                "tokens": 800,
                "tokens_per_second": 600 + 40 * draw.random(),
                "memory_bytes": 39 * 10**8,
                "seconds": 1.3,
            }
        )
        if step % every == 0:
            lines.append(
                {
                    "kind": "validation",
                    "step": step,
                    "epoch": step / 60,
                    "loss": 0.06 + 2.8 * math.exp(-step / 20) + (0.0009 * max(0, step - 96)),
                    "best": step <= 96,
                }
            )
    return lines


def write(folder, evidence=None, **changes):
    given = {
        "curves": log(),
        "environment": ENVIRONMENT,
        "recipe_yaml": RECIPE,
        "language": "en",
        "license": None,
    } | changes
    return report.write(folder, evidence or rich_evidence(), **given)


NASTY = (
    "<script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    "{{ 7 * 7 }} {% raw %} & &amp; \"'`",
    "bell \x07 null \x00 escape \x1b[31m delete \x7f C1 \x85",
    "right to left \u202egnp.exe\u202c and \u2066isolated\u2069",
    "مرحبا بالعالم",
    "字" * 500 + "🙂" * 40,
    "unbroken" * 400,
    "",
    "   \n\t\n",
)


def nasty_evidence(**changes):
    long = "word " * 4000
    rows = [
        Answer(
            where=f"<b>{i}</b>.jsonl",
            prompt=text,
            reference=NASTY[-3 - i % 3],
            before=text[::-1],
            after=text,
            before_right=None,
            after_right=bool(i % 2),
        )
        for i, text in enumerate(NASTY)
    ]
    rows.append(
        Answer(
            where="test.jsonl:99",
            prompt="p",
            reference="word word",
            before=None,
            after=long,
            before_right=None,
            after_right=False,
        )
    )
    first = rich_evidence().measures[0]
    odd = (
        first.model_copy(update={"title": "<i>" + "W" * 120}),
        measure(
            "negative",
            "Negative",
            estimate(-2.5, 0.5),
            estimate(-1.25, 1.5),
            estimate(1.25, 2),
            "no clear change",
            unit="score",
        ),
        measure(
            "infinite",
            "Infinite",
            estimate(math.inf),
            estimate(9e9, math.inf),
            estimate(-math.inf),
            "better",
            unit="ratio",
            up=False,
        ),
        measure(
            "tiny",
            "Tiny",
            estimate(0, 0),
            estimate(0.0001, 0.00005),
            estimate(0.0001, 0.00005),
            "worse",
            group="retention",
            unit="nats",
            up=False,
        ),
    )
    facts = {
        "answers": tuple(rows),
        "measures": odd,
        "verdict": ("<script>alert('verdict')</script>",),
        "notes": NASTY,
        "command": "metier train `x` | <job>.yaml",
        "setting": rich_evidence().setting.model_copy(
            update={"model": "/home/<user>/some model", "method": "|pipes| <method>"}
        ),
    }
    return rich_evidence(**{**facts, **changes})


PROTEINS = (
    "CD3",
    "CD4",
    "CD8a",
    "CD11b",
    "CD14",
    "CD15",
    "CD16",
    "CD19",
    "CD20",
    "CD25",
    "CD45RA",
    "CD45RO",
    "CD56",
    "CD127",
)
CELL_TYPES = ("CD4 T", "CD8 T", "B", "NK", "CD14 monocyte", "CD16 monocyte", "dendritic", "platelet")


def within(value, n, interval="delta, on Fisher's z"):
    """A correlation with Fisher's interval."""
    if n < 4:
        return Estimate(value=value, low=value, high=value, n=n, interval="none: one row")
    half = 1.96 / math.sqrt(n - 3)
    ends = (math.tanh(math.atanh(value) + side * half) for side in (-1, 1))
    return Estimate(value=value, low=next(ends), high=next(ends), n=n, interval=interval)


def target_part(name, skill, draw, n=400):
    """One target's breakdown and points; a skill of None is a target that never varies."""
    measured = [1.5 if skill is None else draw.gauss(1.5, 1) for _ in range(n)]
    predicted = [1.4 + draw.gauss(0, 0.1) if skill is None else skill * y + draw.gauss(0.5, 0.4) for y in measured]
    points = {"measured": [round(y, 4) for y in measured], "predicted": [round(y, 4) for y in predicted]}
    error = math.sqrt(statistics.fmean((x - y) ** 2 for x, y in zip(measured, predicted, strict=True)))
    r = None if skill is None else statistics.correlation(measured, predicted)
    part = Breakdown(
        by="protein",
        key=name,
        n=n,
        pearson=None if r is None else within(r, n),
        ccc=None if r is None else within(0.93 * r, n),
        rmse=estimate(error, 0.05 * error, n),
        note="" if r is not None else "constant",
    )
    return part, Scatter(key=name, n=17 * n, **points)


def group_part(by, key, n, value, targets):
    if n < 10:
        return Breakdown(by=by, key=key, n=n, pearson=None, ccc=None, rmse=None, note="fewer than 10 rows")
    return Breakdown(
        by=by,
        key=key,
        n=n,
        pearson=within(value, targets, "t"),
        ccc=within(0.9 * value, targets, "t"),
        rmse=estimate(0.4, 0.1),
    )


def number_measures(names, rows):
    listed = [
        ("pearson_target", "Pearson per protein", 0.681, 0.688, 0.012, True, names),
        ("spearman_target", "Spearman per protein", 0.644, 0.671, 0.011, True, names),
        ("ccc_target", "Concordance (CCC) per protein", 0.421, 0.652, 0.024, True, names),
        ("rmse_target", "RMSE per protein", 0.97, 0.294, 0.058, False, names),
        ("pearson_row", "Pearson per cell", 0.861, 0.944, 0.004, True, rows),
        ("rmse_row", "RMSE per cell", 1.02, 0.31, 0.02, False, rows),
        ("cosine", "Cosine similarity per cell", 0.933, 0.981, 0.003, True, rows),
        ("mse", "Mean squared error", 12.46, 0.0864, 0.35, False, rows),
    ]
    kept = [
        ("general_pearson_target", "Pearson per protein, pretraining set", 0.891, 0.812, 0.02, True, names),
        ("general_rmse_target", "RMSE per protein, pretraining set", 0.331, 0.402, 0.03, False, names),
        ("general_mse", "Mean squared error, pretraining set", 0.1096, 0.1616, 0.09, False, rows),
    ]
    found = []
    for group, lines in (("domain", listed), ("retention", kept)):
        for name, title, old, new, half, up, n in lines:
            better = new - old if up else old - new
            verdict = "no clear change" if abs(better) <= half else "better" if better > 0 else "worse"
            change = estimate(new - old, half, n)
            given = estimate(old, half, n), estimate(new, half, n), change
            found.append(measure(name, title, *given, verdict, group=group, unit="score", up=up))
    far = estimate(1.21, 0.08, rows)
    title = "Drift of the answers (mean squared)"
    drift = measure("drift", title, None, far, None, "not compared", group="retention", unit="score", up=False)
    return (*found, drift)


def cheap(name, title, pearson, error):
    figures_of = (("pearson_target", pearson, 0.03), ("rmse_target", error, 0.04))
    given = tuple(Figure(name=key, estimate=estimate(value, half, 14)) for key, value, half in figures_of)
    return Baseline(name=name, title=title, how="fitted on the training rows: 5 folds", seconds=1.2, figures=given)


CHEAP = (
    cheap("mean_profile", "Mean profile", 0.0, 0.376),
    cheap("calibrated", "Pretrained, calibrated only", 0.681, 0.295),
    cheap("pls", "Partial least squares", 0.629, 0.308),
)


def numbers_evidence(skills=None, *, types=CELL_TYPES, donors=("P3", "P4"), task="cells", **changes):
    """A model of numbers: one skill for each target."""
    draw = random.Random(3)
    skills = dict(zip(PROTEINS, (0.05 + 0.06 * i for i in range(14)), strict=True)) if skills is None else skills
    made = [target_part(name, skill, draw) for name, skill in skills.items()]
    groups = [
        ("cell_type", key, 4 if key == "platelet" else 900 // (i + 1), 0.62 - 0.8 * i / len(types))
        for i, key in enumerate(types)
    ]
    groups += [("donor", key, 1700 - 300 * i, 0.71 - 0.04 * i) for i, key in enumerate(donors)]
    measures = number_measures(len(skills), 3400)
    rows = [
        Answer(
            where=f"test.h5mu: AAACCTG{i}-1",
            prompt=f"{800 + i} of 4,000 genes: MALAT1 {90 + i}, B2M 71, TMSB4X 45 ...",
            reference="CD3 2.10, CD4 0.31",
            before="CD3 4.02, CD4 1.96",
            after="CD3 2.02, CD4 0.40",
            before_right=None,
            after_right=None,
        )
        for i in range(12)
    ]
    names = ("load", "measure before", "calibrate", "train", "measure after", "save")
    usual = rich_evidence().cost
    cost = usual.model_copy(
        update={"phases": tuple(usual.phases[i].model_copy(update={"name": name}) for i, name in enumerate(names))}
    )
    facts = {
        "setting": rich_evidence().setting.model_copy(
            update={"task": task, "model": "new:cells", "data_format": "cells", "rows_measured": 3400}
        ),
        "cost": cost,
        "primary": "pearson_target",
        "measures": measures,
        "baselines": CHEAP,
        "answers": tuple(rows),
        "notes": (),
        "breakdowns": (*(part for part, _ in made), *(group_part(*group, len(skills)) for group in groups)),
        "scatters": tuple(scatter for _, scatter in made),
    }
    facts |= changes
    told = report.verdict(facts["measures"], CHEAP, cost, facts["primary"], confidence=0.95, voice=EN)
    return rich_evidence(**{"verdict": told, **facts})


def one_target(**changes):
    return numbers_evidence({"yield": 0.8}, types=(), donors=(), task="own", primary="mse", **changes)


def many_targets(**changes):
    skills = {f"CD{i} " + "an antibody with a long name " * 3 + "<i>" * (i % 2): 0.004 * i for i in range(200)}
    types = tuple(f"type {i} of a tissue whose types have long names" for i in range(60))
    return numbers_evidence({**skills, "IgG1 control": None}, types=types, **changes)


CASES = {
    "rich": rich_evidence,
    "full": functools.partial(rich_evidence, full=True),
    "minimal": minimal_evidence,
    "nasty": nasty_evidence,
    "cells": numbers_evidence,
    "one target": one_target,
    "many targets": many_targets,
    "nothing measured": functools.partial(rich_evidence, measures=(), primary="none", verdict=(), finished="yesterday"),
}


def front_matter(folder):
    _, front, body = (folder / "README.md").read_text("utf-8").split("---\n", 2)
    return yaml.safe_load(front), body


# What is written


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("case", CASES)
def test_every_case_is_written_and_read_back(tmp_path, case, language):
    evidence = CASES[case]()
    path = write(tmp_path, evidence, language=language)
    assert path == tmp_path / "report.html"
    assert Evidence.model_validate_json((tmp_path / "evidence.json").read_text("utf-8")) == evidence
    metadata, body = front_matter(tmp_path)
    assert metadata["model-index"][0]["name"] == tmp_path.name
    assert body.strip().startswith("# ")
    reader = Reader(path.read_text("utf-8"))
    assert reader.open == []  # every element is closed, in order
    assert "None" not in reader.words.replace("None of", "")


@pytest.mark.parametrize("case", CASES)
def test_the_page_is_self_contained(tmp_path, case):
    text = write(tmp_path, CASES[case]()).read_text("utf-8")
    reader = Reader(text)
    assert not {"script", "iframe", "object", "base", "form"} & set(reader.tags)
    assert reader.tags.count("img") == 0
    assert all(not name.startswith("on") and name not in {"style", "src"} for name, _ in reader.attributes)
    assert {value for name, value in reader.attributes if name == "href"} == {"data:,"}
    assert re.findall(r"(?:https?:)?//[a-z]", re.sub(r"sha256-[^']*", "", text)) == []
    assert "default-src 'none'" in text


def test_the_policy_allows_exactly_the_style_sheet(tmp_path):
    import base64
    import hashlib

    text = write(tmp_path).read_text("utf-8")
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    assert base64.b64encode(hashlib.sha256(style.encode()).digest()).decode() in text


def test_the_page_says_what_the_evidence_says(tmp_path):
    evidence = rich_evidence()
    words = Reader(write(tmp_path, evidence).read_text("utf-8")).words.replace("\u00a0", " ")
    for sentence in (*evidence.verdict, *evidence.notes):
        assert sentence in words
    for told in (
        "87.5 %",
        "80.4 to 92.3 %",
        "+87.5 points",
        "from 0.0 %",
        "3.512",
        "2 of 4",
        "5 min 56 s",
        "3 min 32 s",
        "3.9 GB",
        "19.6 MB",
    ):
        assert told in words
    for told in (
        "4,884,480 of 139,400,064 (3.5 %)",
        "kept: step 96",
        evidence.command,
        "Linear model on words",
        "71.7 %",
        "Wins 42",
        RECIPE.split()[2],
    ):
        assert told in words


def test_the_chinese_page_has_no_english_left(tmp_path):
    evidence = rich_evidence(verdict=(), notes=(), answers=())
    reader = Reader(write(tmp_path, evidence, language="zh", environment={}, recipe_yaml="").read_text("utf-8"))
    body = reader.words.split("}")[-1]
    for given in (
        evidence.command,
        evidence.setting.method,
        evidence.setting.learning_rate_reason,
        evidence.setting.model,
    ):
        body = body.replace(given, "")
    words = {word.lower() for word in re.findall(r"[A-Za-z]{3,}", body)}
    keys = {m.name for m in evidence.measures} | {
        "wilson",
        "messages",
        "chat",
        "metier",
        "json",
        "evidence",
        "sha",
        "cpu",
        "utc",
        "idf",
    }
    assert words - keys - {part for key in keys for part in key.split("_")} <= {"nats", "score", "ratio", "t"}


def test_both_languages_have_every_text_and_the_same_blanks():
    assert WORDS["en"].keys() == WORDS["zh"].keys()
    blanks = {
        language: {key: set(re.findall(r"{(\w+)}", text)) for key, text in words.items()}
        for language, words in WORDS.items()
    }
    assert blanks["en"] == blanks["zh"]
    assert all(WORDS[language][key].strip() for language in WORDS for key in WORDS[language])


def test_no_text_is_unused():
    room = Path(report.__file__).parent
    source = "".join(
        path.read_text("utf-8")
        for path in [*room.rglob("*.py"), *room.glob("templates/*.html")]
        if not path.name.endswith("words.py")
    )
    built = {
        *(f"stage_{stage}" for stage in rates.SHAPES),
        *(f"{what}_{verdict}" for what in ("pair", "guard") for verdict in forest.STYLES),
        *examples.GROUPS,
        *(f"{name}_note" for name in examples.GROUPS),
        *answers.GROUPS,
        *(f"{name}_note" for name in answers.GROUPS),
        "better",
        "worse",
        "no clear change",
        "not compared",
    }
    assert [key for key in WORDS["en"] if key not in built and not re.search(rf"[\"']{key}[\"']", source)] == []


# Nothing in the data breaks the page


def test_tags_in_the_data_stay_text(tmp_path):
    text = write(tmp_path, nasty_evidence(), environment={"<u>": ["<s>"]}, recipe_yaml="a: <script>").read_text("utf-8")
    reader = Reader(text)
    for given in (
        "<script>alert(1)</script>",
        "<script>alert('verdict')</script>",
        "</style><img src=x onerror=alert(1)>",
        "{{ 7 * 7 }}",
        "<u>",
        "a: <script>",
    ):
        assert given in reader.words
    assert not {"script", "img", "u", "i b"} & set(reader.tags)


def test_control_characters_are_shown_and_order_cannot_be_changed(tmp_path):
    text = write(tmp_path, nasty_evidence()).read_text("utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\x85\u202a-\u202e\u2066-\u2069]", text)
    assert "␇" in text
    assert "␛[31m" in text
    assert "⟨U+202E⟩" in text
    assert "مرحبا بالعالم" in text


def test_the_card_has_one_line_a_cell_and_no_tags(tmp_path):
    write(tmp_path, nasty_evidence())
    _, body = front_matter(tmp_path)
    assert "<" not in re.sub("`[^`]*`", "", body)
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {6, 3}


def test_a_long_answer_is_shortened_with_all_of_it_folded(tmp_path):
    long = "".join(f"{i:05d} " for i in range(3334))[:20_000]
    row = Answer(where="t:1", prompt="p", reference="r", before="b", after=long, before_right=False, after_right=False)
    text = write(tmp_path, rich_evidence(answers=(row,))).read_text("utf-8")
    assert "All 20,000 characters" in text
    assert text.count(long[:600]) == 2
    assert text.count(long) == 1


def test_many_answers_fold_behind_the_first_of_each_group(tmp_path):
    text = write(tmp_path, rich_evidence(answers=talk_answers(60))).read_text("utf-8")
    assert text.count('class="card answer"') == 60
    assert re.search(r"\d+ more</summary>", text)


@pytest.mark.parametrize(
    ("before", "before_right", "after_right", "name"),
    [
        ("b", False, True, "win"),
        ("b", True, False, "loss_group"),
        ("b", True, True, "both_right"),
        ("b", False, False, "both_wrong"),
        (None, None, True, "right"),
        (None, None, False, "wrong"),
        ("b", None, True, "unjudged"),
        ("b", True, None, "unjudged"),
    ],
)
def test_answers_are_grouped_by_who_was_right(before, before_right, after_right, name):
    row = Answer(
        where="t",
        prompt="p",
        reference="r",
        before=before,
        after="a",
        before_right=before_right,
        after_right=after_right,
    )
    assert answers.group(row) == name
    assert name in answers.GROUPS


def test_every_group_has_its_filter():
    css = (Path(report.__file__).parent / "templates" / "style.css").read_text("utf-8")
    for name in answers.GROUPS:
        assert f"#f-{name}:checked ~ .groups > :not(.g-{name})" in css


def test_differences_are_marked_word_by_word():
    assert (
        answers.marked('{"urgency": "low"}', '{"urgency": "high"}')
        == "{&#34;urgency&#34;: &#34;<del>high</del><mark>low</mark>&#34;}"
    )
    assert answers.marked("预计后天送达", "预计明天送达") == "预计<del>明</del><mark>后</mark>天送达"
    assert answers.marked("same <b>", "same <b>") == "same &lt;b&gt;"
    assert answers.marked("nothing in common", "QQQ") == "nothing in common"
    assert answers.marked("one two", "one <x> two") == "one <del>&lt;x&gt; </del>two"


def test_marking_long_texts_is_quick():
    import time

    draw = random.Random(0)
    texts = ["".join(draw.choice("的一是不了人我在有他") for _ in range(answers.SHORT)) for _ in range(2)]
    began = time.process_time()
    answers.marked(*texts)
    assert time.process_time() - began < 1.0


# Figures in words


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [
        (0.875, "share", "87.5 %"),
        (1.2344, "nats", "1.234"),
        (28.456, "ratio", "28.46"),
        (-0.5, "score", "−0.500"),
        (0.0864, "score", "0.0864"),
        (12.46, "score", "12.5"),
        (0.9996, "score", "1.00"),
        (1234.5, "score", "1,234"),
        (0.00004, "score", "0.000040"),
        (0.0, "score", "0.000"),
        (0.00004, "nats", "4e−5"),
        (9e9, "ratio", "9.00e9"),
        (0.0002, "share", "<0.1 %"),
        (12345.6, "ratio", "12,346"),
        (math.inf, "ratio", "∞"),
        (math.nan, "nats", "?"),
    ],
)
def test_amounts_by_unit(value, unit, said):
    assert EN.amount(value, unit) == said


def test_changes_carry_their_sign():
    assert EN.change(0.88, "share") == "+88.0 points"
    assert ZH.change(-0.016, "share") == "−1.6 个百分点"
    assert EN.change(0.0, "nats") == "+0.000"
    assert EN.change(-0.00001, "nats") == "−1e−5"
    assert EN.change(0.0001, "share") == "+0.0 points"
    assert EN.interval(-0.09, 0.06, "share", signed=True) == "−9.0 to +6.0"
    assert EN.change(0.0271, "score") == "+0.027"
    assert EN.change(-12.37, "score") == "−12.4"


def test_both_ends_of_a_score_have_as_many_decimals():
    assert EN.interval(-0.0213, 0.124, "score") == "−0.021 to 0.124"
    assert EN.interval(9.1, 12.46, "score") == "9.1 to 12.5"
    assert EN.interval(0.00712, 0.00934, "score") == "0.00712 to 0.00934"
    assert EN.interval(-0.005, 0.0192, "score", signed=True) == "−0.005 to +0.019"


@pytest.mark.parametrize(
    ("seconds", "en", "zh"),
    [
        (0, "0.0 s", "0.0 秒"),
        (0.421, "0.42 s", "0.42 秒"),
        (5.23, "5.2 s", "5.2 秒"),
        (59.97, "1 min 0 s", "1 分 0 秒"),
        (192, "3 min 12 s", "3 分 12 秒"),
        (3599.6, "1 h 0 min", "1 小时 0 分"),
        (7500, "2 h 5 min", "2 小时 5 分"),
    ],
)
def test_seconds(seconds, en, zh):
    assert (EN.seconds(seconds), ZH.seconds(seconds)) == (en, zh)


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (19_593_264, "19.6 MB"),
        (538_090_408, "538 MB"),
        (3_900_000_000, "3.9 GB"),
        (2.5e12, "2.5 TB"),
    ],
)
def test_sizes(count, said):
    assert EN.size(count) == said


# Charts


def test_a_bar_ends_where_its_value_lies():
    drawn = charts.bar(0.875, (0.8, 0.92), charts.bar_scale([0.875], "share"), style="tuned", title="<t>")
    assert 'x="0.00%" width="87.50%"' in drawn
    assert 'x1="80.00%" x2="92.00%"' in drawn
    assert "<title>&lt;t&gt;</title>" in drawn
    assert 'role="img"' in drawn


def test_a_negative_bar_grows_to_the_left_of_zero():
    scale = charts.bar_scale([-3.0, 1.0], "score")
    drawn = charts.bar(-3.0, None, scale, style="tuned", title="t")
    left, width = map(float, re.search(r'class="bar tuned" x="([\d.]+)%" width="([\d.]+)%"', drawn).groups())
    assert left + width == pytest.approx(scale.percent(0.0), abs=0.02)
    assert left == pytest.approx(scale.percent(-3.0), abs=0.02)


def test_what_is_off_the_scale_stays_inside():
    scale = charts.Scale(0, 2)
    assert [scale.percent(v) for v in (-1, 1, 3, math.inf, -math.inf, math.nan)] == [0, 50, 100, 100, 0, 0]
    assert charts.Scale(1, 1).percent(1) == 0


@pytest.mark.parametrize(
    ("low", "high", "about", "expected"),
    [(0, 3.1, 5, [0, 1, 2, 3]), (0, 8e-4, 3, [0, 5e-4]), (-1, 1, 4, [-1, -0.5, 0, 0.5, 1]), (2, 2, 5, [2])],
)
def test_ticks_are_round(low, high, about, expected):
    assert charts.ticks(low, high, about) == pytest.approx(expected)


def test_tick_labels_are_short():
    assert [charts.number(v) for v in (0, 5e-4, 0.001, 12000, -0.5)] == ["0", "5e-4", "0.001", "12,000", "−0.5"]


def test_one_row_has_no_whisker():
    card = figures.cards([("Tuned", minimal_evidence())], "domain", EN)[0]
    assert "whisker" not in card.bars[0].chart
    assert card.bars[0].interval == "no interval: one value"
    assert card.changes == []


def test_good_is_named_by_direction():
    loss = next(
        card for card in figures.cards([("Tuned", rich_evidence())], "domain", EN) if card.title == "Loss per token"
    )
    assert (loss.direction, loss.verdict, loss.changes[0].verdict) == ("lower is better", "better", "better")
    assert "dot good" in loss.changes[0].chart


# Curves


def test_smoothing_keeps_a_constant_and_starts_at_the_first_value():
    constant = [(float(i), 2.0) for i in range(100)]
    assert [y for _, y in curves.smoothed(constant)] == pytest.approx([2.0] * 100)
    assert curves.smoothed([(1.0, 5.0), (2.0, 1.0)])[0] == (1.0, 5.0)


def test_thinning_keeps_the_mean():
    points = [(float(i), float(i % 7)) for i in range(1400)]
    thin = curves.thinned(points, 200)
    assert len(thin) == 200
    assert sum(y for _, y in thin) / 200 == pytest.approx(sum(y for _, y in points) / 1400)


def test_the_kept_step_is_marked_and_losses_are_tabled():
    drawn = curves.draw(log(), 96, EN)
    assert "kept: step 96" in drawn.loss
    assert 'cx="80.00%"' in drawn.loss
    assert [row for row in drawn.validation if row[3]] == [
        (96, pytest.approx(1.6), pytest.approx(0.083, abs=1e-3), True)
    ]
    assert len(drawn.steps) == curves.TABLE_ROWS
    assert drawn.steps[-1][0] == 120


@pytest.mark.parametrize(
    "lines",
    [
        log(1),
        [line for line in log() if line["kind"] == "step"],
        [line for line in log() if line["kind"] == "validation"],
        [{**line, "loss": math.nan, "grad_norm": math.inf} if line["step"] == 3 else line for line in log(5)],
        [{"kind": "step", "step": 1, "loss": 2.0}],
    ],
    ids=["one step", "no validation", "validation only", "not finite", "few facts"],
)
def test_odd_logs_are_drawn(tmp_path, lines):
    text = write(tmp_path, curves=lines).read_text("utf-8")
    assert 'class="panel"' in text
    assert not re.search(r'(points|cx|cy|x1)="[^"]*(nan|inf)', text)


def test_a_long_log_stays_small(tmp_path):
    assert write(tmp_path, curves=log(20_000, 1000)).stat().st_size < 400_000


# Where a model of numbers works


def section(tmp_path, evidence, **changes):
    text = write(tmp_path, evidence, **changes).read_text("utf-8")
    found = re.search(r'<section id="where">.*?</section>', text, re.DOTALL)
    return found[0] if found else ""


def test_a_model_of_text_has_no_such_section(tmp_path):
    assert section(tmp_path, rich_evidence()) == ""


def test_targets_and_groups_are_shown_best_first(tmp_path):
    part = section(tmp_path, numbers_evidence())
    words = Reader(part).words
    for told in (
        "12 of 14 targets: the 4 best, 4 in the middle and the 4 worst by Pearson. At most 150 rows of each",
        "No correlation: platelet (n = 4, fewer than 10 rows).",
        "CD4 T n = 900 CD4 T: 0.620 (0.133 to 0.866), n = 900 0.620",
        "measured −",
        "150 of 6,800 rows",
    ):
        assert told in words
    assert re.findall(r"<h[34]>(.*?)</h[34]>", part) == [
        "Predicted against measured",
        "Best",
        "In the middle",
        "Worst",
        "By protein",
        "By cell type",
        "By donor",
    ]
    assert part.count('class="scatter"') == places.SCATTERS
    assert words.count("An interval says how much the targets differ") == 1
    by_protein = part.split("By protein</h3>")[1].split("By cell type</h3>")[0]
    shown = [float(x) for x in re.findall(r"<b>(0\.\d+)</b>", by_protein)]
    assert len(shown) == 14
    assert shown == sorted(shown, reverse=True)


def test_every_breakdown_is_in_the_table_with_its_figures(tmp_path):
    evidence = numbers_evidence()
    table = re.search(r'<table class="compare every">.*?</table>', section(tmp_path, evidence), re.DOTALL)[0]
    assert table.count('<th scope="row">') == len(evidence.breakdowns)
    first = evidence.breakdowns[0]
    told = f"{first.key} {first.n} {first.pearson.value:.3f} {first.pearson.low:.3f} to {first.pearson.high:.3f}"
    assert told in Reader(table).words


def test_of_many_targets_the_best_and_the_worst_are_drawn_and_all_are_tabled(tmp_path):
    part = section(tmp_path, many_targets())
    words = Reader(part).words
    by_protein, by_type = part.split("By protein</h3>")[1].split("By cell type</h3>")
    assert by_protein.count('class="dot tuned"') == places.LINES
    assert "160 in between: all are in the table below." in words
    assert "No correlation: IgG1 control (n = 400, constant)." in words
    assert by_type.split("By donor</h3>")[0].count('class="dot tuned"') == places.LINES
    assert part.count('<th scope="row">') == 201 + 60 + 2
    assert "<i>" not in part
    assert (tmp_path / "report.html").stat().st_size < 500_000


def test_a_single_target_has_its_scatter_and_its_figures_at_once(tmp_path):
    part = section(tmp_path, one_target())
    assert part.count('class="scatter"') == 1
    assert "dot-chart" not in part
    assert "<details open>" in part
    assert "By" not in re.findall(r"<h[34]>(.*?)</h[34]>", part)


def test_a_constant_target_is_named_and_its_points_are_drawn(tmp_path):
    part = section(tmp_path, numbers_evidence({"CD3": 0.8, "CD4": None}))
    assert part.count('class="scatter"') == 2
    assert "No correlation: CD4 (n = 400, constant)." in Reader(part).words
    assert not re.search(r'(points|d|x|y|cx|cy|x1|y1)="[^"]*(nan|inf)', part)


def test_what_was_never_measured_has_no_scatter():
    empty = Scatter(key="CD9", n=0, measured=(), predicted=())
    odd = Scatter(key="CD10", n=2, measured=(math.nan, 1.0), predicted=(1.0, math.inf))
    assert places.chosen([empty, odd], {}) == []
    drawn = places.draw(numbers_evidence(scatters=(empty, odd)), EN)
    assert drawn.scatters is None
    assert [plot.title for plot in drawn.plots] == ["By protein", "By cell type", "By donor"]


def test_scatters_alone_or_breakdowns_alone_are_enough(tmp_path):
    assert 'class="scatter"' in section(tmp_path, numbers_evidence(breakdowns=()))
    assert 'class="dot-chart"' in section(tmp_path, numbers_evidence(scatters=()))


def test_a_group_of_a_single_target_has_no_interval(tmp_path):
    alone = group_part("donor", "P3", 40, 0.5, 1)
    evidence = one_target()
    part = section(tmp_path, one_target(breakdowns=(*evidence.breakdowns, alone)))
    assert "P3: 0.500 (no interval), n = 40" in part
    assert "differ in this group" not in part


def test_rows_without_a_group_are_told_from_rows_with_one(tmp_path):
    unnamed = group_part("donor", "", 40, 0.5, 14)
    assert "(no value)" in Reader(section(tmp_path, numbers_evidence(breakdowns=(unnamed,)))).words


def test_a_scatter_has_equal_axes_and_few_bytes():
    line = charts.scatter([(i / 10, i / 10) for i in range(-20, 31)], title="<t>", description="d")
    places_drawn = re.findall(r"M(\d+) (\d+)h0", line)
    assert all(int(x) + int(y) == 200 for x, y in places_drawn)
    assert "<title>&lt;t&gt;</title><desc>d</desc>" in line
    draw = random.Random(0)
    many = charts.scatter([(draw.gauss(0, 1), draw.gauss(0, 1)) for _ in range(150)], title="t", description="d")
    assert len(many) < 4000


def test_one_point_and_equal_points_are_drawn():
    for points in ([(2.0, 2.0)], [(0.0, 0.0)] * 3):
        assert charts.scatter(points, title="t", description="d").count("h0") == 1


def test_a_dot_lies_where_its_value_does():
    scale = charts.correlation_scale([0.9, -0.1])
    assert (scale.low, scale.high) == (-0.25, 1.0)
    drawn = charts.dot(0.75, (0.5, 1.0), scale, style="tuned", title="t")
    assert 'cx="80.00%"' in drawn
    assert 'x1="60.00%" x2="100.00%"' in drawn
    assert charts.correlation_scale([]) == charts.Scale(0.0, 1.0)


def test_numbers_are_neither_marked_nor_sorted_by_who_was_right(tmp_path):
    text = write(tmp_path, numbers_evidence()).read_text("utf-8")
    assert "<mark>" not in text
    assert 'type="radio"' not in text
    words = Reader(text).words
    assert "Measured CD3 2.10, CD4 0.31" in words
    assert "Not judged" not in words
    assert "Training inputs per second" in words
    assert "Training tokens" not in words


def test_the_chinese_page_of_numbers_has_no_english_left(tmp_path):
    evidence = numbers_evidence(answers=(), verdict=())
    write(tmp_path, evidence, language="zh", environment={}, recipe_yaml="")
    words = Reader((tmp_path / "report.html").read_text("utf-8")).words
    body = re.sub(r"[a-z_]+ · score", "", words.split("}")[-1])
    for given in (
        evidence.command,
        evidence.setting.method,
        evidence.setting.learning_rate_reason,
        *CELL_TYPES,
        *PROTEINS,
    ):
        body = body.replace(given, "")
    found = {word.lower() for word in re.findall(r"[A-Za-z]{3,}", body)}
    names = {"pearson", "spearman", "ccc", "rmse", "mse", "gamma"}
    assert found - names <= {"metier", "evidence", "json", "cells", "new", "sha", "cpu", "utc"}
    for told in (
        "按细胞类型",
        "Pearson 相关（按蛋白，预训练集）",
        "回答的漂移（均方）",
        "仅校准的预训练模型",
        "校准",
        "少于 10 行",
    ):
        assert told in words


def test_drift_of_embeddings_and_of_answers_have_different_names():
    moved_answers = numbers_evidence().measures[-1]
    embeddings = moved_answers.model_copy(update={"title": "Embedding drift (1 - cosine)"})
    assert (ZH.measure(moved_answers), ZH.measure(embeddings)) == ("回答的漂移（均方）", "嵌入漂移（1 − 余弦）")


def test_a_mean_over_targets_counts_values(tmp_path):
    words = Reader(write(tmp_path, numbers_evidence()).read_text("utf-8")).words
    assert "t · 14 values" in words
    assert "t · 3,400 rows" in words


# The card


def test_the_hub_reads_the_model_index(tmp_path):
    from huggingface_hub.repocard_data import model_index_to_eval_results

    evidence = rich_evidence()
    write(tmp_path, evidence, license="apache-2.0")
    metadata, _ = front_matter(tmp_path)
    name, results = model_index_to_eval_results(metadata["model-index"])
    assert name == tmp_path.name
    assert {r.metric_type: r.metric_value for r in results} == {
        m.name: pytest.approx(m.after.value) for m in evidence.measures
    }
    assert results[0].metric_name == "Exact match (95 % interval 80.4 to 92.3 %; n = 120)"
    assert metadata["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (metadata["license"], metadata["language"], metadata["library_name"]) == (
        "apache-2.0",
        ["en"],
        "transformers",
    )
    assert "datasets" not in metadata


def test_the_card_names_no_place_on_this_machine(tmp_path):
    local = rich_evidence().setting.model_copy(update={"model": str(tmp_path / "my-base")})
    write(tmp_path / "run", rich_evidence(setting=local))
    metadata, body = front_matter(tmp_path / "run")
    assert "base_model" not in metadata
    assert "license" not in metadata
    assert str(tmp_path) not in body
    assert "my-base" in body


def test_the_card_says_what_got_worse(tmp_path):
    write(tmp_path, rich_evidence())
    limits = front_matter(tmp_path)[1].split("## Limits")[1]
    assert "Got clearly worse by tuning: General text, English, General replies, English." in limits
    write(tmp_path, minimal_evidence())
    assert "was not measured" in front_matter(tmp_path)[1].split("## Limits")[1]


@pytest.mark.parametrize(
    ("texts", "language"),
    [
        (["我的快递在哪里？", "在上海。"], "zh"),
        (["Where is the parcel that I have sent to you?"], "en"),
        (["荷物はどこですか。東京にあります"], None),
        (["Wo ist mein Paket geblieben, bitte?"], None),
        (['{"a": 1}'], None),
        ([], None),
    ],
)
def test_the_language_is_only_said_where_it_is_plain(texts, language):
    from metier.report.card import language_of

    assert language_of(texts) == language


@pytest.mark.parametrize(("name", "adapter"), [("llama", False), ("llama", True), ("bert", False), ("bert", True)])
def test_the_loading_code_of_the_card_runs(tmp_path, monkeypatch, name, adapter):
    import peft
    import tiny
    import transformers

    base = tiny.make(name, tmp_path / "base")
    classes = {"num_labels": 5} if name == "bert" else {}
    auto = transformers.AutoModelForSequenceClassification if classes else transformers.AutoModelForCausalLM
    module = auto.from_pretrained(base, **classes)
    folder = tmp_path / "run"
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    if adapter:
        kind = "SEQ_CLS" if classes else "CAUSAL_LM"
        peft.get_peft_model(module, peft.LoraConfig(task_type=kind, r=2, target_modules="all-linear")).save_pretrained(
            folder / "adapter"
        )
    else:
        module.save_pretrained(folder)
    task = {"task": "classify" if classes else "chat"}
    write(folder, rich_evidence(setting=rich_evidence().setting.model_copy(update=task)))
    metadata, body = front_matter(folder)
    assert metadata["library_name"] == ("peft" if adapter else "transformers")
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(body.split("```python\n")[1].split("```")[0], found)
    logits = found["model"](**found["tokenizer"]("The parcel", return_tensors="pt")).logits
    assert logits.shape[-1] == (5 if classes else module.config.vocab_size)


@pytest.mark.parametrize(("task", "given"), [("cells", "adata"), ("own", "rows")])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_card_of_a_model_of_numbers_loads_it_with_metier(tmp_path, task, given, language):
    (tmp_path / "adapter").mkdir()
    write(tmp_path, numbers_evidence(task=task), language=language)
    metadata, body = front_matter(tmp_path)
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("metier", "tabular-regression")
    assert {result["task"]["type"] for result in metadata["model-index"][0]["results"]} == {"tabular-regression"}
    assert not {"base_model", "base_model_relation", "language"} & metadata.keys()
    assert [block.split("```")[0] for block in body.split("```python\n")[1:]] == [
        f'import metier\n\nspecialist = metier.load("{tmp_path.name}")\nspecialist.predict({given})\n'
    ]
    assert not re.search("tokenizer|transformers|peft", body, re.IGNORECASE)
    assert ('obsm["protein_predicted"]' in body) == (task == "cells")


# Several runs


def two_runs():
    return [("LoRA", rich_evidence()), ("full", rich_evidence(full=True))]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_runs_side_by_side(tmp_path, language):
    write(tmp_path / "LoRA")
    elsewhere = write(tmp_path / "a folder" / "full #1")
    path = report.write_comparison(
        tmp_path, two_runs(), ("<b>Full</b> won.", "It cost more."), language, reports={"full": elsewhere}
    )
    assert path == tmp_path / "comparison.html"
    reader = Reader(path.read_text("utf-8"))
    links = [value for name, value in reader.attributes if name == "href" and value != "data:,"]
    assert links == ["LoRA/report.html", "a%20folder/full%20%231/report.html"]
    assert "<b>Full</b> won." in reader.words
    assert "script" not in reader.tags
    for told in ("87.5 %", "90.0 %", "538 MB", "100 %", "3.352"):
        assert told in reader.words


@pytest.mark.parametrize("language", ["en", "zh"])
def test_models_of_numbers_side_by_side(tmp_path, language):
    runs = [("LoRA", numbers_evidence()), ("full", many_targets()), ("alone", one_target())]
    reader = Reader(report.write_comparison(tmp_path, runs, ("x",), language).read_text("utf-8"))
    assert reader.open == []
    for told in ("0.0864", "12.5", "0.688"):
        assert told in reader.words
    assert report.compare_table(runs, language).row_count > len(runs[0][1].measures)


def test_one_run_or_many_can_be_compared(tmp_path):
    for count in (1, 8):
        runs = [(f"run {i}", rich_evidence(full=bool(i % 2))) for i in range(count)]
        assert report.write_comparison(tmp_path, runs, (), "en").exists()


def test_different_bases_are_said(tmp_path):
    other = rich_evidence().setting.model_copy(update={"model_fingerprint": "0" * 64})
    runs = [("a", rich_evidence()), ("b", rich_evidence(setting=other))]
    text = report.write_comparison(tmp_path, runs, (), "en").read_text("utf-8")
    assert WORDS["en"]["different_base"] in text
    assert WORDS["en"]["different_data"] not in text


def test_who_forgot_more_is_said_with_its_certainty():
    assert page.lost_most("reply_en", two_runs()) == (0, True)
    assert page.lost_most("text_zh", two_runs()) is None  # both gained
    assert page.lost_most("probe_en", two_runs()) is None  # a tie
    assert page.lost_most("kl", two_runs()) is None  # no change to compare
    near = [("a", rich_evidence()), ("b", _moved("reply_en", 0.01))]
    assert page.lost_most("reply_en", near) == (1, False)


def _moved(name, by):
    def move(m):
        if m.name != name:
            return m
        shift = {key: getattr(m.change, key) + by for key in ("value", "low", "high")}
        return m.model_copy(update={"change": m.change.model_copy(update=shift)})

    return rich_evidence(measures=tuple(move(m) for m in rich_evidence().measures))


def test_best_is_only_said_where_intervals_lie_apart():
    low, high, wide = estimate(1, 0.1), estimate(2, 0.1), estimate(1.9, 5)
    assert page.clearly_best([low, high], higher_is_better=True) == 1
    assert page.clearly_best([low, high], higher_is_better=False) == 0
    assert page.clearly_best([low, None, high], higher_is_better=True) == 2
    assert page.clearly_best([low, high, wide], higher_is_better=True) is None
    assert page.clearly_best([high], higher_is_better=True) is None
    assert page.clearly_best([estimate(1, 0, n=1), estimate(2, 0, n=1)], higher_is_better=True) is None


# The terminal


def test_the_summary_is_plain_and_aligned():
    text = report.summary(rich_evidence())
    assert text.startswith(rich_evidence().verdict[0])
    assert "\x1b" not in text
    rows = [line for line in text.splitlines() if line.endswith(("better", "worse", "change"))]
    assert len(rows) == 8
    assert len({re.search(r"(better|worse|no clear change)$", row).start() for row in rows}) == 1
    assert "Linear model on words, Exact match 71.7 %" in text


@pytest.mark.parametrize("case", CASES)
def test_every_case_has_a_summary(case):
    text = report.summary(CASES[case](), "zh")
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", text)


def test_the_table_of_runs():
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report.compare_table(two_runs()))
    lines = console.export_text().splitlines()
    row = {line.split("  ")[0].strip(): line.split() for line in lines}
    assert row["Exact match"][-6:] == ["0.0", "%", "87.5", "%", "90.0", "%"]
    assert row["Parameters moved"][-4:] == ["3.5", "%", "100", "%"]
    assert row["Linear model on words (Exact match)"][-2:] == ["71.7", "%"]
    few = report.compare_table(two_runs(), measures=("exact_match", "kl"))
    assert few.row_count == report.compare_table(two_runs()).row_count - 7


# In a browser


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM.exists(), reason="Chromium is not installed")
class TestInChromium:
    def test_the_console_is_read(self, tmp_path):
        bad = tmp_path / "bad.html"
        bad.write_text("<meta http-equiv=Content-Security-Policy content=\"default-src 'none'\"><p style='color:red'>x")
        assert browse(tmp_path, bad)[1]

    @pytest.mark.parametrize("case", ["rich", "minimal", "nasty", "cells", "one target", "many targets"])
    def test_reports_render_without_a_word_on_the_console(self, tmp_path, case):
        document, console = browse(tmp_path, write(tmp_path, CASES[case]()))
        assert console == []
        assert "</footer>" in document

    def test_comparisons_render_without_a_word_on_the_console(self, tmp_path):
        path = report.write_comparison(tmp_path, [*two_runs(), ("nasty", nasty_evidence())], NASTY, "zh")
        document, console = browse(tmp_path, path)
        assert console == []
        assert "</footer>" in document

    @pytest.mark.parametrize("case", ["rich", "nasty", "cells", "many targets"])
    def test_nothing_is_wider_than_a_telephone(self, tmp_path, case):
        text = write(tmp_path, CASES[case](), environment={"x" * 90: "y" * 900}).read_text("utf-8")
        text = re.sub(r"<meta http-equiv.*?>", "", text, count=1)
        probe = "<script>document.title = `${document.documentElement.scrollWidth}/${window.innerWidth}`</script>"
        (tmp_path / "probe.html").write_text(
            text.replace("</body>", probe + "</body>").replace("<details", "<details open"), "utf-8"
        )
        document, _ = browse(tmp_path, tmp_path / "probe.html")
        width, window = map(int, re.search(r"<title>(\d+)/(\d+)</title>", document).groups())
        assert window <= 500
        assert width <= window


# ------------------------------------------------------------------------------------------------ the verdict


def sentences(voice, *measures, baselines=()):
    cost = Cost(
        phases=(Phase(name="train", wall_seconds=125.0, cpu_seconds=250.0, peak_memory_bytes=2_300_000_000),),
        tokens_per_second=200.0,
        steps=10,
        best_step=10,
        parameters_moved=4_900_000,
        parameters_total=139_400_000,
        bytes_on_disk=1,
    )
    return report.verdict(measures, baselines, cost, measures[0].name, confidence=0.95, voice=voice)


def moved(name, before, after, half, verdict, **more):
    return measure(
        name, name.capitalize(), estimate(before), estimate(after), estimate(after - before, half), verdict, **more
    )


LOSS = {"unit": "nats", "up": False}


def test_the_verdict_says_what_was_gained_what_was_lost_and_what_it_cost():
    gain = moved("exact_match", 0.0, 0.93, 0.05, "better")
    lost = moved("text_en", 3.54, 4.083, 0.06, "worse", group="retention", **LOSS)
    told = sentences(EN, gain, lost)
    assert told[0] == (
        "Tuning helped: Exact_match went from 0.0 % to 93.0 % (+93.0 points, 95 % interval +88.0 points to +98.0 points)."
    )
    assert told[1:] == (
        "It cost general ability: Text_en 3.540 to 4.083.",
        "4.9 M of 139.4 M parameters moved, in 2 min 5 s of training with at most 2.3 GB.",
    )
    assert "完全匹配" in sentences(ZH, gain, lost)[0]


def test_where_the_figure_is_unmoved_the_loss_may_still_tell_of_learning():
    unmoved = moved("exact_match", 0.0, 0.04, 0.08, "no clear change")
    fell = moved("loss", 1.4, 0.857, 0.05, "better", **LOSS)
    assert "from 1.400 to 0.857 nats" in sentences(EN, unmoved, fell)[1]
    assert len(sentences(EN, unmoved, moved("loss", 1.4, 1.39, 0.05, "no clear change", **LOSS))) == 3
    assert len(sentences(EN, moved("exact_match", 0.0, 0.5, 0.08, "better"), fell)) == 3


def test_an_error_that_fell_is_a_gain():
    error = moved("rmse", 0.97, 0.29, 0.05, "better", unit="score", up=False)
    assert sentences(EN, error)[0] == (
        "Tuning helped: Rmse went from 0.970 to 0.290 (−0.680, 95 % interval −0.730 to −0.630)."
    )
    assert sentences(ZH, error)[0] == "微调有效：Rmse从 0.970 变为 0.290（变化 −0.680，95 % 区间 −0.730 至 −0.630）。"


def test_of_numbers_nothing_is_said_in_nats():
    unmoved = moved("pearson_target", 0.67, 0.68, 0.08, "no clear change", unit="score")
    fell = moved("loss", 1.4, 0.857, 0.05, "better", unit="score", up=False)
    for measures in ((unmoved, fell), numbers_evidence().measures):
        assert not any("nats" in sentence for sentence in sentences(EN, *measures))


def test_a_new_network_is_not_compared():
    after = estimate(0.69, 0.03, 14)
    new = measure("pearson_target", "Pearson per protein", None, after, None, "not compared", unit="score")
    assert sentences(EN, new)[0] == (
        "Pearson per protein after tuning is 0.690 (95 % interval 0.660 to 0.720); the base cannot do this task, "
        "its output layer is new."
    )


def test_the_cheap_way_of_numbers_is_the_best_by_the_figure_that_decides():
    tuned = moved("pearson_target", 0.66, 0.67, 0.05, "no clear change", unit="score")
    wins = "A cheap alternative does as well or better: Pretrained, calibrated only reaches 0.681."
    assert sentences(EN, tuned, baselines=CHEAP)[1] == wins
    error = moved("rmse_target", 0.97, 0.29, 0.05, "better", unit="score", up=False)
    loses = "The best cheap alternative, Pretrained, calibrated only, reaches 0.295."
    assert sentences(EN, error, baselines=CHEAP)[1] == loses


def test_a_cheap_way_that_does_as_well_is_named_as_such():
    cheap = Baseline(
        name="linear_words",
        title="Linear model on words",
        how="-",
        seconds=0.1,
        figures=(Figure(name="accuracy", estimate=share(0.92, 0.89, 0.94)),),
    )
    tuned = moved("accuracy", 0.5, 0.9, 0.05, "better")
    assert "does as well or better: Linear model on words reaches 92.0 %" in sentences(EN, tuned, baselines=[cheap])[1]
    better = moved("accuracy", 0.5, 0.95, 0.05, "better")
    assert sentences(EN, better, baselines=[cheap])[1].startswith("The best cheap alternative")
