"""The measurement: the same rows, the same items, before and after tuning, and what changed between the two."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, assert_never

import numpy as np

from metier.core.evidence import Answer, Baseline, Estimate, Figure, Measure
from metier.evaluation import baselines, retention, statistics
from metier.evaluation.measured import Measured, Rows
from metier.evaluation.metrics import METRICS, Answered, Metric, check_asked, codes
from metier.tasks import Answering, score

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from metier.data.records import Record
    from metier.evaluation.pack import Item
    from metier.recipe import EvaluateSection
    from metier.tasks import TextTask

MOST_LOGITS = 1 << 26
"""Scores held at once while measuring: 256 MiB in float32."""


def measure(
    task: TextTask[Any],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    test: Sequence[Record],
    section: EvaluateSection,
    pack: Sequence[Item],
    *,
    base: Measured | None,
    new_head: bool = False,
    train: Sequence[Record] = (),
) -> Measured:
    """Measure one state of the model.

    Args:
        task: What is learnt.
        model: The network; it is put into evaluation mode.
        tokenizer: Its tokenizer.
        test: The rows to measure on.
        section: The recipe's settings.
        pack: Items of the retention pack.
        base: The base's measurement, when this is the tuned model; None when this is the base.
        new_head: Whether the output layer was never trained: a base's domain figures would then be noise.
        train: Training rows for the baselines, which are only made for a base.
    """
    model.eval()
    batch_tokens = _batch_tokens(model)
    how = Answering(max_new_tokens=section.max_new_tokens)
    asks = section.generate and any(task.question(record) for record in test)
    answers = tuple(task.answer(model, test, how)) if asks and not new_head else ()
    rows = judged(task, test, answers, section) if answers else {}
    rows |= {} if new_head else _loss(task, model, test, batch_tokens)
    kept, anchors, notes = _retention(task, model, tokenizer, test, answers, pack, base, batch_tokens)
    cheap: tuple[Any, ...] = ()
    if base is None and asks and section.baselines and train:
        cheap = baselines.measure(
            task, model, tokenizer, train, test, how, functools.partial(_figures, task, test, section=section)
        )
    return Measured(rows | kept, answers, anchors, cheap, notes)


def shown_examples(
    task: TextTask[Any],
    model: nn.Module,
    train: Sequence[Record],
    test: Sequence[Record],
    section: EvaluateSection,
    *,
    context: int,
    seed: int,
) -> Baseline | None:
    """What the untuned model reaches once it is shown training rows; None where it cannot be or nobody asks."""
    if not (section.generate and section.baselines and train):
        return None
    model.eval()
    how = Answering(max_new_tokens=section.max_new_tokens)
    judge = functools.partial(_figures, task, test, section=section)
    return baselines.few_shot(task, model, train, test, how, judge, context=context, seed=seed)


def compare(before: Measured | None, after: Measured, confidence: float) -> tuple[Measure, ...]:
    """Every metric of the tuned model beside the base's, with the change paired by row."""
    return tuple(
        _compare(name, before.rows.get(name) if before else None, rows, confidence) for name, rows in after.rows.items()
    )


def side_by_side(
    task: TextTask[Any], test: Sequence[Record], before: Measured | None, after: Measured, primary: str
) -> tuple[Answer, ...]:
    """Every answered row with both answers, and whether they are right where the primary metric says so."""
    right_after = after.rows.get(primary)
    right_before = before.rows.get(primary) if before else None
    made = []
    for i, record in enumerate(test[: len(after.answers)]):
        made.append(
            Answer(
                where=record.where,
                prompt=task.question(record),
                reference=task.reference(record),
                before=before.answers[i] if before and before.answers else None,
                after=after.answers[i],
                before_right=_right(right_before, i),
                after_right=_right(right_after, i),
            )
        )
    return tuple(made)


def primary_metric(task: TextTask[Any], measured: Measured) -> str:
    """The metric that decides: the first of the task's that could be measured, else the loss."""
    return next((name for name in task.metrics if name in measured.rows), "loss")


def judged(
    task: TextTask[Any], test: Sequence[Record], answers: Sequence[str], section: EvaluateSection
) -> dict[str, Rows]:
    """The domain metrics of given answers."""
    rows = _answered(task, test, answers)
    found = {}
    for name in task.metrics:
        metric = METRICS[name]
        if metric.applies(rows, section):
            found[name] = _domain_rows(metric, rows, section)
    return found


def unjudged(task: TextTask[Any], test: Sequence[Record], section: EvaluateSection) -> tuple[str, ...]:
    """What the recipe asks to be measured and some test rows cannot be judged by, as sentences.

    Raises:
        RecipeError: If not one of them can.
    """
    if not section.generate:
        return ()
    return check_asked(task.metrics, _answered(task, test, [task.reference(record) for record in test]), section)


def _answered(task: TextTask[Any], test: Sequence[Record], answers: Sequence[str]) -> list[Answered]:
    return [
        Answered(task.question(record), answer, task.reference(record), record.extras)
        for record, answer in zip(test, answers, strict=True)
    ]


def _domain_rows(metric: Metric, rows: Sequence[Answered], section: EvaluateSection) -> Rows:
    if metric.row is None:
        given, wanted = codes([row.answer for row in rows], [row.reference for row in rows])
        return Rows(metric.title, "domain", "whole", metric.unit, True, given.astype(float), wanted.astype(float))  # noqa: FBT003
    values = np.array([metric.row(row, section) for row in rows])
    kind: Any = "share" if metric.unit == "share" else "mean"
    return Rows(metric.title, "domain", kind, metric.unit, True, values, np.ones(len(rows)))  # noqa: FBT003


def _figures(
    task: TextTask[Any], test: Sequence[Record], answers: Sequence[str], *, section: EvaluateSection
) -> tuple[Figure, ...]:
    found = judged(task, test, answers, section)
    return tuple(Figure(name=name, estimate=estimate(name, rows, section.confidence)) for name, rows in found.items())


def _loss(task: TextTask[Any], model: nn.Module, test: Sequence[Record], batch_tokens: int) -> dict[str, Rows]:
    loss = score(task, model, task.encode(test, training=False), batch_tokens=batch_tokens)
    total, weight = loss.total_B.numpy(), loss.weight_B.numpy()
    found = {"loss": Rows(f"Loss per {task.unit}", "domain", "ratio", "nats", False, total, weight)}  # noqa: FBT003
    if task.unit == "token":
        found["perplexity"] = Rows("Perplexity", "domain", "perplexity", "ratio", False, total, weight)  # noqa: FBT003
    return found


def _retention(
    task: TextTask[Any],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    test: Sequence[Record],
    answers: tuple[str, ...],
    pack: Sequence[Item],
    base: Measured | None,
    batch_tokens: int,
) -> tuple[dict[str, Rows], dict[str, Tensor], tuple[str, ...]]:
    """Rows of the retention group, the anchors of a base, and notes."""
    if not pack:
        return {}, {}, ()
    if task.retains == "none":
        return {}, {}, ("retention is not measured for this kind of model",)
    if task.retains == "encoder":
        rows, vectors = retention.measure_encoder(model, tokenizer, pack)
        if base is not None and "embeddings" in base.anchors:
            drift = 1 - (vectors * base.anchors["embeddings"]).sum(dim=1).double().numpy()
            rows["drift"] = retention.distance_rows("Embedding drift (1 - cosine)", "score", drift)
        return rows, {} if base else {"embeddings": vectors}, () if base else retention.chance_notes(rows)
    rows = retention.measure_language(task, model, tokenizer, pack, batch_tokens=batch_tokens)
    if base is None:
        anchor = retention.log_probabilities(task, model, test, answers) if answers else None
        return rows, {} if anchor is None else {"log_probabilities": anchor}, retention.chance_notes(rows)
    if "log_probabilities" in base.anchors:
        tuned = retention.log_probabilities(task, model, test, base.answers)
        kl = retention.divergence(base.anchors["log_probabilities"], tuned)
        rows["kl"] = retention.distance_rows("KL from the base on domain prompts", "nats", kl)
    return rows, {}, ()


def _compare(name: str, old: Rows | None, new: Rows, confidence: float) -> Measure:
    change = None if old is None or new.kind == "distance" else _change(name, old, new, confidence)
    return Measure(
        name=name,
        title=new.title,
        group=new.group,
        unit=new.unit,
        higher_is_better=new.higher_is_better,
        before=None if old is None else estimate(name, old, confidence),
        after=estimate(name, new, confidence),
        change=change,
        verdict=statistics.verdict(change, higher_is_better=new.higher_is_better),  # type: ignore[arg-type]
    )


def estimate(name: str, rows: Rows, confidence: float) -> Estimate:
    """The figure that a metric's values make, with its interval."""
    match rows.kind:
        case "share":
            return statistics.share(rows.values, confidence)
        case "ratio" | "perplexity":
            return statistics.ratio(rows.values, rows.weights, confidence, exponential=rows.kind == "perplexity")
        case "whole" | "median":
            return statistics.bootstrap(lambda chosen: figure(name, rows, chosen), len(rows.values), confidence)
        case "mean" | "distance":
            return statistics.mean(rows.values, confidence)
        case _:
            assert_never(rows.kind)


def _change(name: str, old: Rows, new: Rows, confidence: float) -> Estimate:
    match new.kind:
        case "share":
            return statistics.share_change(old.values, new.values, confidence)
        case "ratio" | "perplexity":
            exponential = new.kind == "perplexity"
            return statistics.ratio_change(
                (old.values, old.weights), (new.values, new.weights), confidence, exponential=exponential
            )
        case "whole" | "median":
            return statistics.bootstrap(
                lambda chosen: figure(name, new, chosen) - figure(name, old, chosen), len(new.values), confidence
            )
        case "mean" | "distance":
            return statistics.mean_change(old.values, new.values, confidence)
        case _:
            assert_never(new.kind)


def figure(name: str, rows: Rows, chosen: Any) -> float:
    """A figure that is no mean, a median or one of METRICS of all rows together, on the rows with these indices."""
    if rows.kind == "median":
        return float(np.median(rows.values[chosen]))
    whole = METRICS[name].whole
    if whole is None:
        raise AssertionError(name)
    return whole(rows.values[chosen].astype(np.int64), rows.weights[chosen].astype(np.int64))


def _right(rows: Rows | None, index: int) -> bool | None:
    return None if rows is None or rows.kind != "share" else bool(rows.values[index] == 1)


def _batch_tokens(model: nn.Module) -> int:
    """Tokens at once, so that the scores of all of them fit."""
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None) or 1
    return max(256, min(8192, MOST_LOGITS // int(vocabulary)))
