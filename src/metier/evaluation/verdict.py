"""What the figures say, in two or three sentences, and nothing that was not measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from metier.core.evidence import Baseline, Cost, Estimate, Measure

if TYPE_CHECKING:
    from metier.core.evidence import Figure

WORDS = {
    "en": {
        "better": "Tuning helped: {title} went from {before} to {after} ({change}, {confidence} interval {low} to {high}).",
        "worse": "Tuning hurt: {title} went from {before} to {after} ({change}, {confidence} interval {low} to {high}).",
        "no clear change": "No clear effect: {title} went from {before} to {after} ({change}, {confidence} interval {low} to {high}, which includes none).",
        "not compared": "{title} after tuning is {after} ({confidence} interval {low} to {high}); the base cannot do this task, its output layer is new.",
        "cheap wins": "A cheap alternative does as well or better: {baseline} reaches {figure}.",
        "cheap loses": "The best cheap alternative, {baseline}, reaches {figure}.",
        "kept": "Nothing measurable was lost on the {n} retention measures.",
        "lost": "It cost general ability: {items}.",
        "gained": "Retention: {items}.",
        "unknown": "Retention was not measured.",
        "cost": "{moved} of {total} parameters moved, in {seconds} of training with at most {memory}.",
        "and": "; ",
        "from to": "{title} {before} to {after}",
    },
    "zh": {
        "better": "微调有效：{title}从 {before} 变为 {after}（变化 {change}，{confidence} 区间 {low} 至 {high}）。",
        "worse": "微调有害：{title}从 {before} 变为 {after}（变化 {change}，{confidence} 区间 {low} 至 {high}）。",
        "no clear change": "没有明确效果：{title}从 {before} 变为 {after}（变化 {change}，{confidence} 区间 {low} 至 {high}，包含零）。",
        "not compared": "微调后{title}为 {after}（{confidence} 区间 {low} 至 {high}）；基座模型的输出层是新建的，无法直接完成此任务。",
        "cheap wins": "廉价方案不逊于微调：{baseline}达到 {figure}。",
        "cheap loses": "最好的廉价方案（{baseline}）达到 {figure}。",
        "kept": "{n} 项保持度指标均未见可测的损失。",
        "lost": "代价是通用能力下降：{items}。",
        "gained": "保持度：{items}。",
        "unknown": "未测量保持度。",
        "cost": "{total} 个参数中有 {moved} 个被调整，训练耗时 {seconds}，内存峰值 {memory}。",
        "and": "；",
        "from to": "{title} {before} → {after}",
    },
}


def verdict(
    measures: Sequence[Measure],
    baselines: Sequence[Baseline],
    cost: Cost,
    primary: str,
    *,
    confidence: float,
    language: Literal["en", "zh"],
) -> tuple[str, ...]:
    """The sentences: gain, cheap alternatives, retention, cost; those that there is nothing to say on are left out."""
    words = WORDS[language]
    main = next(measure for measure in measures if measure.name == primary)
    sentences = [_gain(main, words, confidence)]
    cheap = _cheap(main, baselines, words)
    if cheap:
        sentences.append(cheap)
    sentences.append(_retention(measures, words))
    sentences.append(_cost(cost, words))
    return tuple(sentences)


def number(value: float, unit: str, *, signed: bool = False) -> str:
    """A figure as people write it: shares in percent, else three significant decimals."""
    sign = "+" if signed else ""
    if unit == "share":
        return f"{100 * value:{sign}.1f}{' points' if signed else ' %'}"
    return f"{value:{sign}.3f}"


def _gain(main: Measure, words: dict[str, str], confidence: float) -> str:
    interval = main.change or main.after
    signed = main.change is not None
    return words[main.verdict].format(
        title=main.title,
        before=number(main.before.value, main.unit) if main.before else "-",
        after=number(main.after.value, main.unit),
        change=number(interval.value, main.unit, signed=signed),
        low=number(interval.low, main.unit, signed=signed),
        high=number(interval.high, main.unit, signed=signed),
        confidence=f"{100 * confidence:.0f} %",
    )


def _cheap(main: Measure, baselines: Sequence[Baseline], words: dict[str, str]) -> str | None:
    found: list[tuple[Baseline, Estimate]] = [
        (baseline, figure.estimate) for baseline in baselines for figure in baseline.figures if _is(figure, main)
    ]
    if not found:
        return None
    best, estimate = max(found, key=lambda pair: pair[1].value if main.higher_is_better else -pair[1].value)
    wins = estimate.value >= main.after.value if main.higher_is_better else estimate.value <= main.after.value
    return words["cheap wins" if wins else "cheap loses"].format(
        baseline=best.title, figure=number(estimate.value, main.unit)
    )


def _is(figure: Figure, main: Measure) -> bool:
    return figure.name == main.name


def _retention(measures: Sequence[Measure], words: dict[str, str]) -> str:
    kept = [measure for measure in measures if measure.group == "retention" and measure.change is not None]
    if not kept:
        return words["unknown"]
    lost = [measure for measure in kept if measure.verdict == "worse"]
    if not lost:
        return words["kept"].format(n=len(kept))
    items = [
        words["from to"].format(
            title=measure.title,
            before=number(measure.before.value, measure.unit) if measure.before else "-",
            after=number(measure.after.value, measure.unit),
        )
        for measure in lost
    ]
    return words["lost"].format(items=words["and"].join(items))


def _cost(cost: Cost, words: dict[str, str]) -> str:
    training = next((phase for phase in cost.phases if phase.name == "train"), None)
    seconds = training.wall_seconds if training else 0.0
    memory = max((phase.peak_memory_bytes for phase in cost.phases), default=0)
    return words["cost"].format(
        moved=count(cost.parameters_moved),
        total=count(cost.parameters_total),
        seconds=f"{seconds:.0f} s",
        memory=f"{memory / 1e9:.1f} GB",
    )


def count(number_: int) -> str:
    """A count of parameters in thousands, millions or billions."""
    for size, word in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number_ >= size:
            return f"{number_ / size:.1f} {word}"
    return str(number_)
