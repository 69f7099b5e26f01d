"""What the figures say, in two or three sentences, and nothing that was not measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from metier.report.figures import has_interval

if TYPE_CHECKING:
    from metier.core.evidence import Baseline, Cost, Measure
    from metier.report.voice import Voice

WORDS = {
    "en": {
        "better": "Tuning helped: {title} went from {before} to {after} ({change}, {confidence} interval {low} to {high}).",
        "worse": "Tuning hurt: {title} went from {before} to {after} ({change}, {confidence} interval {low} to {high}).",
        "no clear change": "No clear effect: {title} went from {before} to {after} ({change}, {confidence} interval {low} to {high}, which includes none).",
        "not compared": "{title} after tuning is {after} ({confidence} interval {low} to {high}); the base cannot do this task, its output layer is new.",
        "fitted": "No step of tuning was kept: the fit in closed form alone took {title} from {before} to {after} ({change}, {confidence} interval {low} to {high}).",
        "alone": "{title} went from {before} to {after}; it was measured on one value only, so nothing says how sure that is.",
        "alone new": "{title} after tuning is {after}; it was measured on one value only, so nothing says how sure that is.",
        "learnt": "The loss on the answers did fall, from {before} to {after} nats: something was learnt that this figure does not show.",
        "cheap wins": "A cheap alternative does as well or better: {baseline} reaches {figure}.",
        "cheap loses": "The best cheap alternative, {baseline}, reaches {figure}.",
        "kept": "Nothing measurable was lost on the {n} retention measures.",
        "lost": "It cost general ability: {items}.",
        "unknown": "Retention was not measured.",
        "cost": "{moved} of {total} parameters moved, in {seconds} of training with at most {memory}.",
        "cost fitted": "Fitting and training took {seconds} with at most {memory}; what training moved was not kept.",
        "and": "; ",
        "from to": "{title} {before} to {after}",
    },
    "zh": {
        "better": "微调有效：{title}从 {before} 变为 {after}（变化 {change}，{confidence} 区间 {low} 至 {high}）。",
        "worse": "微调有害：{title}从 {before} 变为 {after}（变化 {change}，{confidence} 区间 {low} 至 {high}）。",
        "no clear change": "没有明确效果：{title}从 {before} 变为 {after}（变化 {change}，{confidence} 区间 {low} 至 {high}，包含零）。",
        "not compared": "微调后{title}为 {after}（{confidence} 区间 {low} 至 {high}）；基座模型的输出层是新建的，无法直接完成此任务。",
        "fitted": "没有保留任何一步微调：仅靠闭式拟合，{title}从 {before} 变为 {after}（变化 {change}，{confidence} 区间 {low} 至 {high}）。",
        "alone": "{title}从 {before} 变为 {after}；只在一个值上测量，无法给出区间。",
        "alone new": "微调后{title}为 {after}；只在一个值上测量，无法给出区间。",
        "learnt": "答案上的损失确有下降，从 {before} 到 {after} nats：学到了一些该指标未反映的东西。",
        "cheap wins": "廉价方案不逊于微调：{baseline}达到 {figure}。",
        "cheap loses": "最好的廉价方案（{baseline}）达到 {figure}。",
        "kept": "{n} 项保持度指标均未见可测的损失。",
        "lost": "代价是通用能力下降：{items}。",
        "unknown": "未测量保持度。",
        "cost": "{total} 个参数中有 {moved} 个被调整，训练耗时 {seconds}，内存峰值 {memory}。",
        "cost fitted": "拟合与训练耗时 {seconds}，内存峰值 {memory}；训练所作的调整未被保留。",
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
    voice: Voice,
) -> tuple[str, ...]:
    """The sentences: gain, cheap alternatives, retention, cost; those that there is nothing to say on are left out."""
    main = next(measure for measure in measures if measure.name == primary)
    found = (
        _gain(main, voice, confidence, kept=cost.best_step > 0),
        _learnt(main, measures, voice),
        _cheap(main, baselines, voice),
        _retention(measures, voice),
        _cost(cost, voice),
    )
    return tuple(sentence for sentence in found if sentence)


def _gain(main: Measure, voice: Voice, confidence: float, *, kept: bool) -> str:
    interval = main.change or main.after
    amount = voice.amount if main.change is None else voice.change
    low, high = amount(interval.low, main.unit), amount(interval.high, main.unit)
    if main.unit == "score":
        low, high = voice.ends(interval.low, interval.high, main.unit, signed=main.change is not None)
    said: str = main.verdict if kept or main.change is None else "fitted"
    if not has_interval(interval):
        said = "alone new" if main.change is None else "alone"
    return WORDS[voice.language][said].format(
        title=voice.measure(main),
        before=_before(main, voice),
        after=voice.amount(main.after.value, main.unit),
        change=amount(interval.value, main.unit),
        low=low,
        high=high,
        confidence=voice.coverage(confidence),
    )


def _learnt(main: Measure, measures: Sequence[Measure], voice: Voice) -> str | None:
    """What to say where the figure that decides is unmoved and the loss, which sees smaller steps, is not."""
    loss = next((measure for measure in measures if measure.name == "loss" and measure.unit == "nats"), None)
    if main.verdict != "no clear change" or loss is None or loss.verdict != "better":
        return None
    after = voice.amount(loss.after.value, loss.unit)
    return WORDS[voice.language]["learnt"].format(before=_before(loss, voice), after=after)


def _cheap(main: Measure, baselines: Sequence[Baseline], voice: Voice) -> str | None:
    found = [
        (baseline, figure.estimate) for baseline in baselines for figure in baseline.figures if figure.name == main.name
    ]
    if not found:
        return None
    best, estimate = max(found, key=lambda pair: pair[1].value if main.higher_is_better else -pair[1].value)
    wins = estimate.value >= main.after.value if main.higher_is_better else estimate.value <= main.after.value
    return WORDS[voice.language]["cheap wins" if wins else "cheap loses"].format(
        baseline=voice.baseline(best), figure=voice.amount(estimate.value, main.unit)
    )


def _retention(measures: Sequence[Measure], voice: Voice) -> str:
    words = WORDS[voice.language]
    kept = [measure for measure in measures if measure.group == "retention" and measure.change is not None]
    if not kept:
        return words["unknown"]
    lost = [measure for measure in kept if measure.verdict == "worse"]
    if not lost:
        return words["kept"].format(n=len(kept))
    items = [
        words["from to"].format(
            title=voice.measure(measure),
            before=_before(measure, voice),
            after=voice.amount(measure.after.value, measure.unit),
        )
        for measure in lost
    ]
    return words["lost"].format(items=words["and"].join(items))


def _before(measure: Measure, voice: Voice) -> str:
    return voice.amount(measure.before.value, measure.unit) if measure.before else "-"


def _cost(cost: Cost, voice: Voice) -> str:
    training = next((phase for phase in cost.phases if phase.name == "train"), None)
    return WORDS[voice.language]["cost" if cost.best_step > 0 else "cost fitted"].format(
        moved=voice.parameters(cost.parameters_moved),
        total=voice.parameters(cost.parameters_total),
        seconds=voice.seconds(training.wall_seconds if training else 0.0),
        memory=voice.size(max((phase.peak_memory_bytes for phase in cost.phases), default=0)),
    )
