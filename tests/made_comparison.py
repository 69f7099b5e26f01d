"""Made-up comparisons for tests of the page: drawn by a fixed chance, measured by nobody."""

from __future__ import annotations

import math
import random
import statistics

from metier.core.comparison import (
    Arm,
    Cell,
    Comparison,
    CurvePoint,
    Difference,
    Guard,
    Interference,
    Pair,
    Predicted,
    Stability,
    Strength,
    Told,
    Trial,
    Way,
)
from metier.core.evidence import Baseline, Estimate, Figure

ROWS = 240
SEEDS = (0, 1, 2)
DELTA = 0.01
HALF = {"accuracy": 0.026, "loss": 0.03, "text_en": 0.021}
"""Half of an interval."""

ARMS = {
    "freeze": ("Frozen but last 2 blocks", 0.742, 0.701, 0.998, 3e-4, 0.36, 1.9e9, 14_000_000, 0.7),
    "lora": ("LoRA, rank 16", 0.861, 0.402, 0.991, 3e-4, 1.0, 2.1e9, 19_500_000, 1.0),
    "full": ("Full", 0.866, 0.391, 0.968, 3e-5, 1.4, 4.4e9, 538_000_000, 1.0),
}
"""Title, accuracy, test loss, share kept, best rate, time, memory, bytes on disk, how far the search reaches."""
BASE = {"accuracy": 0.421, "loss": 1.62, "text_en": 3.291}


def estimate(value, half=0.0, n=ROWS, interval="two-way t"):
    return Estimate(value=value, low=value - half, high=value + half, n=n, interval=interval)


def difference(value, half, *, rows=ROWS, seeds=3):
    p = 2 * (1 - statistics.NormalDist().cdf(abs(value) / (half / 1.96))) if half else 0.0
    return Difference(
        value=value,
        low=value - half,
        high=value + half,
        narrow_low=value - 0.84 * half,
        narrow_high=value + 0.84 * half,
        degrees_of_freedom=31.2,
        rows=rows,
        clusters=rows,
        seeds=seeds,
        p=p,
        p_adjusted=p,
        smallest_seen=1.43 * half,
    )


def judged(found, delta, *, higher):
    if found.low > 0 or found.high < 0:
        return "better" if (found.value > 0) == higher else "worse"
    return "equivalent" if -delta < found.narrow_low and found.narrow_high < delta else "inconclusive"


def pair(left, right, measure, value, half, *, delta=DELTA, primary=False, verdict=None, title=None, **needed):
    found = difference(value, half)
    units = {"accuracy": ("share", True, "Accuracy"), "loss": ("nats", False, "Loss per row")}
    unit, higher, named = units.get(measure, ("nats", False, "General text, English"))
    verdict = verdict or judged(found, delta, higher=higher)
    open_ = verdict == "inconclusive"
    return Pair(
        left=left,
        right=right,
        measure=measure,
        title=title or named,
        unit=unit,
        higher_is_better=higher,
        primary=primary,
        difference=found,
        delta=delta,
        verdict=verdict,
        rows_needed=needed.get("rows_needed", 1900) if open_ else None,
        seeds_needed=needed.get("seeds_needed") if open_ else None,
    )


def trials(best, lowest, draw, *, reach=1.0, diverges=True):
    """A search: a coarse grid around the best rate, finer points beside it, one that diverged."""
    found = []
    for factor, stage in ((1 / 3, "coarse"), (1, "coarse"), (3.3, "coarse"), (0.58, "fine"), (1.73, "fine")):
        loss = lowest + 0.32 * (math.log10(factor) / 0.8) ** 2 * reach + 0.01 * draw.random()
        found.append(Trial(rate=best * factor, stage=stage, loss=loss, seconds=41.0))
    if diverges:
        found.append(Trial(rate=best * 10, stage="edge", loss=None, seconds=6.0))
    return tuple(found)


def strengths(gain, kept):
    """A path that bends: most of the gain is there before most of the loss."""
    return tuple(
        Strength(
            share=share,
            gain=gain * (1 - (1 - share) ** 1.8),
            kept=1 - (1 - kept) * share**1.7,
            chosen=share == 0.85,
        )
        for share in (0.0, 0.3, 0.5, 0.7, 0.85, 1.0)
    )


def cell(seed, accuracy, loss, kept, seconds, memory, /, **more):
    general = 3.291 - math.log(kept or 1.0)
    facts = {
        "figures": {"accuracy": accuracy, "loss": loss, "text_en": general},
        "kept": kept,
        "best_step": 96,
        "steps": 120,
        "seconds_to_best": 0.8 * seconds,
        "seconds": seconds,
        "cpu_seconds": 1.9 * seconds,
        "peak_memory_bytes": int(memory),
        "tokens_per_second": 120_000 / seconds,
        "diverged": False,
        "strengths": strengths(BASE["loss"] - loss, kept or 1.0),
    }
    return Cell(seed=seed, **{**facts, **more})


def arm(name, title, accuracy, loss, kept, rate, time, memory, disk, reach, /, **more):
    draw = random.Random(name)
    cells = tuple(
        cell(
            seed,
            accuracy + draw.gauss(0, 0.008),
            loss + draw.gauss(0, 0.012),
            min(1.0, kept + draw.gauss(0, 0.0015)),
            130 * time * (1 + 0.04 * draw.random()),
            memory,
        )
        for seed in SEEDS
    )
    mean = statistics.fmean(c.figures["accuracy"] for c in cells)
    facts = {
        "method": f"{title}: what moves",
        "learning_rate": rate,
        "at_edge": False,
        "trials": trials(rate, loss * 1.06, draw, reach=reach),
        "cells": cells,
        "figures": {
            "accuracy": estimate(mean, 0.041),
            "loss": estimate(loss, 0.05),
            "text_en": estimate(3.291 - math.log(kept), 0.08, 64),
        },
        "kept": estimate(kept, 0.0035, 3, "t"),
        "stability": Stability(
            deviation=statistics.stdev(c.figures["accuracy"] for c in cells),
            worst=min(c.figures["accuracy"] for c in cells),
            diverged=1 / 9,
            sensitivity=0.11,
        ),
        "parameters_moved": disk // 4,
        "bytes_on_disk": disk,
        "seconds_to_load": 0.02 if "lora" in name else 0.4,
        "search_seconds": 211.0 * time,
        "predicted": Predicted(
            seconds=120.0 * time,
            seconds_by_trials=126.0 * time,
            seconds_measured=130.0 * time,
            peak_memory_bytes=int(memory * 0.96),
            peak_memory_bytes_by_trials=int(memory * 0.99),
            peak_memory_bytes_measured=int(memory),
        ),
    }
    return Arm(name=name, title=title, **{**facts, **more})


def pairs(arms, base=BASE):
    """Every arm against the base and against every earlier one, the primary measure first."""
    found = []
    for measure in ("accuracy", "loss", "text_en"):
        delta = DELTA if measure == "accuracy" else 0.01 * base.get(measure, 1.0)
        figures = {"base": base.get(measure)} | {a.name: a.figures[measure].value for a in arms if measure in a.figures}
        names = [name for name, value in figures.items() if value is not None]
        found += [
            pair(
                left,
                right,
                measure,
                figures[right] - figures[left],
                HALF[measure],
                delta=delta,
                primary=measure == "accuracy",
            )
            for i, right in enumerate(names)
            for left in names[:i]
        ]
    return tuple(found)


def curve(arms):
    """LoRA ahead on few rows, full ahead on many."""
    slopes = {"freeze": (0.66, 0.03), "lora": (0.741, 0.055), "full": (0.701, 0.081)}
    found = []
    for part in arms:
        start, slope = slopes.get(part.name, (0.7, 0.05))
        for share in (0.25, 0.5, 1.0):
            value = start + slope * math.log2(share / 0.125)
            values = tuple(value + wobble for wobble in (-0.009, 0.002, 0.007))
            found.append(
                CurvePoint(
                    arm=part.name,
                    share=share,
                    rows=round(960 * share),
                    learning_rate=part.learning_rate,
                    values=values,
                    estimate=estimate(value, 0.045 - 0.02 * share),
                )
            )
    return tuple(found)


GUARDS = (
    Guard(
        arm="full",
        name="replay",
        title="replay, 0.05",
        strengths={"replay": 0.05},
        figures={"accuracy": 0.859},
        kept=0.989,
        kept_without=0.974,
        difference=difference(0.015, 0.006),
        verdict="better",
    ),
    Guard(
        arm="lora",
        name="replay",
        title="replay, 0.05",
        strengths={"replay": 0.05},
        figures={"accuracy": 0.858},
        kept=0.993,
        kept_without=0.992,
        difference=difference(0.001, 0.004),
        verdict="equivalent",
    ),
    Guard(
        arm="full",
        name="kl",
        title="KL to the base, 0.1",
        strengths={"kl": 0.1},
        figures={"accuracy": 0.852},
        kept=0.981,
        kept_without=0.977,
        difference=difference(0.004, 0.008),
        verdict="inconclusive",
    ),
)


def held(value):
    """A score over rows and seeds."""
    return Estimate(value=value, low=value - 0.03, high=value + 0.03, n=240, interval="t over rows and seeds")


def way(name, title, rows, *, forgotten=(0.0, 0.0, 0.0), behind=(), **changes):
    """One way to hold the tasks; `behind` is how far it is from one adapter each."""
    beside = tuple(
        pair(task, name, measure, change, 0.02, primary=True)
        for task, measure, change in zip(("support desk", "banking77", "reviews"), MEASURES, behind, strict=False)
    )
    scores = tuple(tuple(map(held, row)) for row in rows)
    facts = {"scores": scores, "forgotten": forgotten, "beside_own": beside, "seconds_to_switch": None}
    return Way(name=name, title=title, **{**facts, **changes})


MEASURES = ("accuracy", "accuracy", "accuracy")

TASKS = Interference(
    metier="0.1.0",
    finished="2026-11-20T09:30:00+00:00",
    command="metier compare desk.yaml banking.yaml reviews.yaml",
    model="demo:smollm2-135m",
    tasks=("support desk", "banking77", "reviews"),
    rows_train=(804, 1540, 450),
    rows_measured=(120, 240, 200),
    learning_rates=(2e-3, 7.5e-4, 7.5e-4),
    seeds=SEEDS,
    confidence=0.95,
    measure=MEASURES,
    titles=("Accuracy",) * 3,
    units=("share", "share", "share"),
    higher_is_better=(True, True, True),
    base=tuple(map(held, (0.0, 0.12, 0.61))),
    ways=(
        way(
            "switched",
            "One adapter each",
            ((0.91, 0.10, 0.58), (0.02, 0.88, 0.60), (0.0, 0.13, 0.79)),
            seconds_to_switch=0.012,
        ),
        way("linear", "Linear merge", ((0.52, 0.55, 0.70),), behind=(-0.39, -0.33, -0.09)),
        way("ties", "TIES", ((0.61, 0.58, 0.71),), behind=(-0.3, -0.3, -0.08)),
        way("dare", "DARE", ((0.60, 0.57, 0.71),), behind=(-0.31, -0.31, -0.08)),
        way("joint", "Joint", ((0.90, 0.86, 0.78),), behind=(-0.01, -0.02, -0.01)),
        way(
            "sequence",
            "In sequence",
            ((0.91, 0.10, 0.58), (0.40, 0.88, 0.55), (0.31, 0.63, 0.80)),
            forgotten=(0.60, 0.25, 0.0),
            behind=(-0.6, -0.25, 0.01),
        ),
    ),
    notes=("all test rows are of one <b>donor</b>",),
)

ASKED = (
    ("I was charged twice for order 4411.", "billing_duplicate", (False, True, True)),
    ("Where is my parcel? Tracking has been silent since Monday.", "delivery_late", (False, True, False)),
    ("Please change the delivery address before it ships.", "address_change", (True, False, True)),
    ("How do I reset my password on the app?", "account_access", (True, True, True)),
    ("The blue kettle arrived with a cracked lid.", "damaged_item", (False, False, False)),
    ("Do you ship to Norway?", "shipping_question", (True, False, False)),
)


def told():
    names = ("base", "lora", "full")
    return tuple(
        Told(
            where=f"test.jsonl:{i + 1}",
            prompt=f"{prompt} (ticket {i + 100})",
            reference=reference,
            answers={n: reference if right else "other" for n, right in zip(names, rights, strict=True)},
            right=dict(zip(names, rights, strict=True)),
        )
        for i, (prompt, reference, rights) in enumerate(ASKED * 4)
    )


def baseline(name, title, value, half=0.04, seconds=0.4):
    figures = (Figure(name="accuracy", estimate=estimate(value, half, interval="wilson")),)
    return Baseline(name=name, title=title, how=f"how {title} is made", seconds=seconds, figures=figures)


BASELINES = (
    baseline("most_common", "Most common answer", 0.092),
    baseline("linear_words", "Linear model on words", 0.717),
    baseline("nearest_class", "Nearest class mean", 0.688),
)


def comparison(arms=None, **changes):
    """A whole one: three arms, three seeds, every section."""
    arms = tuple(arm(name, *facts) for name, facts in ARMS.items()) if arms is None else arms
    facts = {
        "metier": "0.1.0",
        "finished": "2026-11-24T09:25:11+00:00",
        "command": "metier compare job.yaml --methods freeze,lora,full --seeds 3 --data-curve 25,50,100",
        "model": "demo:smollm2-135m",
        "model_fingerprint": "9f2c" * 16,
        "data_fingerprint": "07ab" * 16,
        "task": "classify",
        "rows_train": 960,
        "rows_validation": 120,
        "rows_measured": ROWS,
        "steps": 120,
        "batch_size": 16,
        "precision": "float32",
        "seeds": SEEDS,
        "primary": "accuracy",
        "delta": DELTA,
        "confidence": 0.95,
        "floor": 0.98,
        "verdict": (),
        "base": {
            "accuracy": estimate(0.421, 0.06),
            "loss": estimate(1.62, 0.05),
            "text_en": estimate(3.291, 0.08, 64),
        },
        "titles": {"accuracy": "Accuracy", "loss": "Loss per row", "text_en": "General text, English"},
        "units": {"accuracy": "share", "loss": "nats", "text_en": "nats"},
        "higher_is_better": {"accuracy": True, "loss": False, "text_en": False},
        "groups": {"accuracy": "domain", "loss": "domain", "text_en": "retention"},
        "baselines": BASELINES,
        "arms": arms,
        "pairs": pairs(arms),
        "curve": curve(arms),
        "guards": GUARDS,
        "told": told(),
        "budget_seconds": 3600.0,
        "seconds": 3312.0,
        "shrunk": ("2 finer points of the search for a rate left out",),
        "notes": ("3 rows were longer than 512 tokens and were dropped: train.jsonl:17, train.jsonl:203",),
    }
    return Comparison(**{**facts, **changes})


def small(**changes):
    """One arm, one seed, no base, nothing kept measured, one row: as little as there can be."""
    only = cell(0, 1.0, 0.1, None, 12.0, 1e9, strengths=(), figures={"accuracy": 1.0})
    single = arm(
        "full",
        *ARMS["full"],
        cells=(only,),
        kept=None,
        trials=(Trial(rate=3e-5, stage="coarse", loss=0.4, seconds=3.0),),
        figures={"accuracy": Estimate(value=1.0, low=1.0, high=1.0, n=1, interval="none: one row")},
        stability=Stability(deviation=0.0, worst=1.0, diverged=0.0, sensitivity=None),
        predicted=Predicted(
            seconds=None, seconds_measured=12.0, peak_memory_bytes=None, peak_memory_bytes_measured=10**9
        ),
    )
    empty = {"pairs": (), "curve": (), "guards": (), "told": (), "shrunk": (), "notes": ()}
    facts = {"base": {}, "baselines": (), "floor": None, "budget_seconds": None, "seeds": (0,), "rows_measured": 1}
    return comparison((single,), **{**empty, **facts, **changes})


def crowded(**changes):
    """Six arms that end at nearly the same place, and many cheap ways at nearly the same height."""
    title, *facts = ARMS["lora"]
    arms = tuple(
        arm(f"lora:rank={2**i}", f"{title.split(',')[0]}, rank {2**i}", facts[0] + 0.002 * i, *facts[1:])
        for i in range(6)
    )
    cheap = tuple(baseline(f"cheap_{i}", f"Cheap way number {i}", 0.7 + 0.004 * i) for i in range(7))
    return comparison(arms, baselines=cheap, **changes)


NASTY = (
    "<script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    "{{ 7 * 7 }} & &amp; \"'`",
    "bell \x07 escape \x1b[31m \u202egnp.exe",
    "字" * 60,
    "unbroken" * 60,
)


def hostile(**changes):
    """Names that would break a page, and figures that are not numbers."""
    arms = []
    for name, (_, *facts) in zip(NASTY[:4], [*ARMS.values(), ARMS["full"]], strict=True):
        made = arm(name, name, *facts)
        arms.append(made)
    lost = cell(0, math.nan, math.inf, None, 12.0, 1e9, diverged=True, strengths=(), figures={})
    gone = arm(
        "gone",
        NASTY[5],
        *ARMS["full"][1:],
        cells=(lost, lost, lost),
        kept=estimate(math.nan, math.nan),
        figures={"accuracy": estimate(math.nan, math.inf)},
        trials=(
            Trial(rate=1e-4, stage="coarse", loss=None, seconds=1.0),
            Trial(rate=3e-4, stage="coarse", loss=math.inf, seconds=1.0),
        ),
        stability=Stability(deviation=math.nan, worst=math.nan, diverged=1.0, sensitivity=None),
        at_edge=True,
    )
    found = [*arms, gone]
    hurt = pair("base", "gone", "accuracy", math.nan, math.inf, primary=True, verdict="inconclusive", title=NASTY[0])
    facts = {
        "pairs": (*pairs(arms), hurt),
        "curve": tuple(
            point.model_copy(update={"arm": NASTY[i % 4], "estimate": estimate(math.nan if i == 2 else 0.5, 0.1)})
            for i, point in enumerate(curve(arms))
        ),
        "guards": tuple(g.model_copy(update={"title": NASTY[i], "kept": math.nan}) for i, g in enumerate(GUARDS)),
        "told": tuple(
            Told(where=text, prompt=text, reference=text, answers={NASTY[0]: text}, right={NASTY[0]: False})
            for text in NASTY
        ),
        "model": NASTY[0],
        "command": NASTY[2],
        "notes": NASTY,
        "shrunk": NASTY[:1],
        "baselines": (baseline("x", NASTY[1], math.nan, math.nan), baseline("y", NASTY[4], 0.5)),
        "titles": {"accuracy": NASTY[0], "loss": NASTY[4], "text_en": "General text, English"},
    }
    return comparison(tuple(found), **{**facts, **changes})


CASES = {"whole": comparison, "small": small, "crowded": crowded, "hostile": hostile}
