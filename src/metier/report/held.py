"""What each way to hold several tasks on one base does to them, in three lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from metier.core.comparison import Interference, Way
    from metier.core.evidence import Estimate
    from metier.report.voice import Voice

WORDS = {
    "en": {
        "own": "One adapter each reaches {items} (the base {before}); putting another one to use takes {milliseconds} ms.",
        "one model": "Of single models, {way} comes closest: {items}.",
        "forgets": "Training in sequence ends at {items}; of what was learnt before, {lost} changed.",
        "on": "{value} on {task}",
        "comma": ", ",
        "joint": "joint training",
        "linear": "the mean of the adapters",
        "ties": "their TIES merge",
        "dare": "their DARE merge",
    },
    "zh": {
        "own": "每个任务各用一个适配器：{items}（基座模型 {before}）；切换一次需 {milliseconds} 毫秒。",
        "one model": "单一模型中最接近的是{way}：{items}。",
        "forgets": "依次训练的结果：{items}；先学的任务变化了 {lost}。",
        "on": "{task} {value}",
        "comma": "，",
        "joint": "联合训练",
        "linear": "适配器的平均",
        "ties": "TIES 合并",
        "dare": "DARE 合并",
    },
}
SINGLE = ("joint", "linear", "ties", "dare")
"""Ways that end in one model."""


def held(found: Interference, voice: Voice) -> tuple[str, ...]:
    """One adapter each, the best single model, and what training in sequence forgot."""
    words, ways = WORDS[voice.language], {way.name: way for way in found.ways}
    switched, sequence = ways["switched"], ways["sequence"]
    own = [switched.scores[i][i] for i in range(len(found.tasks))]

    def told(scores: Sequence[Estimate]) -> str:
        texts = [
            words["on"].format(task=task, value=voice.amount(score.value, unit))
            for task, score, unit in zip(found.tasks, scores, found.units, strict=True)
        ]
        return words["comma"].join(texts)

    best = min((ways[name] for name in SINGLE), key=lambda way: _shortfall(way, own, found.higher_is_better))
    changes = [
        voice.change(-lost if up else lost, unit)
        for lost, unit, up in zip(sequence.forgotten, found.units, found.higher_is_better, strict=True)
    ]
    milliseconds = f"{1000 * (switched.seconds_to_switch or 0.0):.1f}"
    return (
        words["own"].format(items=told(own), before=told(found.base), milliseconds=milliseconds),
        words["one model"].format(way=words[best.name], items=told(best.scores[-1])),
        words["forgets"].format(items=told(sequence.scores[-1]), lost=words["comma"].join(changes[:-1])),
    )


def _shortfall(way: Way, own: Sequence[Estimate], higher_is_better: Sequence[bool]) -> float:
    """How far one model stays behind one adapter each, as parts of what those reach, over tasks."""
    gaps = zip(own, way.scores[-1], higher_is_better, strict=True)
    return sum(
        (best.value - score.value if up else score.value - best.value) / max(abs(best.value), 1e-9)
        for best, score, up in gaps
    )
