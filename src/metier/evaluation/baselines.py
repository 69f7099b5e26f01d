"""Cheap alternatives to tuning, on the same test rows: what the tuned model must beat to be worth its cost.

Shapes: N training rows, M test rows, H width of the embedding.
"""

from __future__ import annotations

import functools
import random
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from metier.core.evidence import Baseline, Figure
from metier.core.rng import derive
from metier.evaluation.retention import embeddings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from metier.data.records import Record
    from metier.tasks import Answering, TextTask

SHOTS = 8
"""Training rows that the base is shown, as many as its context holds. Judgement: the number that is in common use."""
MOST_ANSWERS = 200
"""With more distinct answers, choosing among them is no longer a baseline but a search."""


def measure(
    task: TextTask[Any],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Record],
    test: Sequence[Record],
    how: Answering,
    judge: Callable[[Sequence[str]], tuple[Figure, ...]],
) -> tuple[Baseline, ...]:
    """All baselines that the rows allow.

    Args:
        task: What is learnt.
        model: The base, before tuning.
        tokenizer: Its tokenizer.
        train: Training rows.
        test: The measured test rows.
        how: Limits of generation.
        judge: Takes answers to the test rows and gives the domain figures.
    """
    references = _few_references(task, train)
    distinct = sorted(set(references))
    if not distinct or len(distinct) * 2 > len(references) or not all(task.question(row) for row in train):
        return ()
    questions, asked = ([task.question(row) for row in side] for side in (train, test))
    found = [_timed("most_common", judge, lambda: [Counter(references).most_common(1)[0][0]] * len(asked))]
    found.append(_timed("linear_words", judge, lambda: linear_words(questions, references, asked)))
    if task.retains == "encoder":
        began = time.perf_counter()
        train_NH, test_MH = (embeddings(model, tokenizer, texts).numpy() for texts in (questions, asked))
        spent = time.perf_counter() - began
        for name, fitted in (("nearest_class", nearest_class), ("frozen_linear", frozen_linear)):
            answer = functools.partial(fitted, train_NH, references, test_MH)
            found.append(_timed(name, judge, answer, before=spent))
    among = getattr(task, "answer_among", None)
    if callable(among):
        found.append(_timed("base_among", judge, lambda: among(model, test, how, distinct)))
    return tuple(found)


def few_shot(
    task: TextTask[Any],
    model: nn.Module,
    train: Sequence[Record],
    test: Sequence[Record],
    how: Answering,
    judge: Callable[[Sequence[str]], tuple[Figure, ...]],
    *,
    context: int,
    seed: int,
) -> Baseline | None:
    """The untuned model shown some training rows with their answers before it is asked; None where that cannot be.

    Not among those that `measure` makes, for it takes another pass of answers over the test rows.

    Args:
        task: What is learnt; only tasks with `with_examples` can be shown examples.
        model: The base.
        train: Training rows.
        test: The measured test rows.
        how: Limits of generation.
        judge: Takes answers to the test rows and gives the domain figures.
        context: Longest input of the network, in tokens.
        seed: For the draw of the rows that are shown.
    """
    together: Any = getattr(task, "with_examples", None)
    if together is None or not all(task.question(row) for row in test):
        return None
    prompt: Any = task.prompt  # type: ignore[attr-defined]
    drawn = random.Random(derive(seed, "shots")).sample(range(len(train)), min(SHOTS, len(train)))  # noqa: S311
    shown = [train[i] for i in drawn]
    room = context - how.max_new_tokens
    while shown and max(len(prompt(together(row, shown))) for row in test) > room:
        shown.pop()
    if not shown:
        return None

    def answers() -> list[str]:
        found = task.answer(model, [together(row, shown) for row in test], how)
        # A text that goes on and on as the examples did would write the next one.
        between = getattr(task, "between", None)
        return found if between is None else [answer.partition(between)[0] for answer in found]

    found = _timed("few_shot", judge, answers)
    return found.model_copy(update={"how": found.how.format(n=len(shown))})


def _few_references(task: TextTask[Any], train: Sequence[Record]) -> list[str]:
    """The answer of every row, equal ones kept once; none where there are too many to choose among."""
    known: dict[str, str] = {}
    found: list[str] = []
    for row in train:
        reference = task.reference(row)
        found.append(known.setdefault(reference, reference))
        if len(known) > MOST_ANSWERS:
            return []
    return found


TITLES = {
    "most_common": ("Most common answer", "always gives the most common training answer"),
    "linear_words": (
        "Linear model on words",
        "linear support vectors on TF-IDF of words and character groups; no language model",
    ),
    "nearest_class": ("Nearest class mean", "embeddings of the untuned encoder; the class with the closest mean"),
    "frozen_linear": ("Linear model on frozen encoder", "ridge classifier on embeddings of the untuned encoder"),
    "few_shot": (
        "Base, shown examples",
        "the untuned model, shown {n} training rows with their answers before it is asked",
    ),
    "base_among": (
        "Base, choosing among known answers",
        "the untuned model decodes greedily, restricted to answers that occur in the training rows",
    ),
}


def _timed(
    name: str,
    judge: Callable[[Sequence[str]], tuple[Figure, ...]],
    answer: Callable[[], Sequence[str]],
    *,
    before: float = 0.0,
) -> Baseline:
    """The baseline's figures; `before` is what it needs and another has paid for."""
    began = time.perf_counter()
    answers = answer()
    seconds = before + time.perf_counter() - began
    title, how = TITLES[name]
    return Baseline(name=name, title=title, how=how, seconds=seconds, figures=judge(answers))


def linear_words(questions: Sequence[str], references: Sequence[str], asked: Sequence[str]) -> list[str]:
    """Linear support vectors on TF-IDF of words and of character groups, which also serve languages without spaces."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline, make_union
    from sklearn.svm import LinearSVC

    features = make_union(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True),
    )
    return _fitted(make_pipeline(features, LinearSVC(random_state=0)), questions, references, asked)


def frozen_linear(train_NH: Any, references: Sequence[str], test_MH: Any) -> list[str]:
    """Ridge classifier on the untuned encoder's embeddings, scaled to unit variance."""
    from sklearn.linear_model import RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), RidgeClassifier(alpha=10.0))
    return _fitted(model, train_NH, references, test_MH)


def nearest_class(train_NH: Any, references: Sequence[str], test_MH: Any) -> list[str]:
    """The class whose mean embedding is most similar by cosine."""
    classes = sorted(set(references))
    index = np.array([classes.index(label) for label in references])
    means = np.stack([train_NH[index == i].mean(axis=0) for i in range(len(classes))])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    return [classes[best] for best in (test_MH @ means.T).argmax(axis=1)]


def _fitted(model: Any, questions: Any, references: Sequence[str], asked: Any) -> list[str]:
    if len(set(references)) == 1:
        return [references[0]] * len(asked)
    model.fit(questions, list(references))
    return [str(answer) for answer in model.predict(asked)]
