"""The answer in three lines: which way, by how much, under which conditions; and nothing that was not measured."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from metier.core.comparison import Arm, Pair
from metier.report.charts import number
from metier.report.experiment.costs import mean
from metier.report.experiment.forest import needed
from metier.report.experiment.view import BASE, View, known

WORDS = {
    "en": {
        "none": "No arm ended with numbers: every training diverged.",
        "fitted": "No step of tuning was better on validation than what is fitted in closed form before it, which reaches {figure} by itself ({title}).",
        "cheap wins": "Tuning is not worth it here: {baseline} reaches {figure} without it, the best tuned arm, {arm}, {tuned} ({title}).",
        "cheap as well": "A cheap way does as well: {baseline} reaches {figure} without tuning, the best tuned arm, {arm}, {tuned} ({title}; differences below {delta} count as none).",
        "cheap loses": "The best cheap way, {baseline}, reaches {figure}.",
        "hurts": "Tuning hurt: the best arm, {arm}, is worse than the base by {gap} in {title} ({confidence} interval {low} to {high}).",
        "no effect": "Tuning changed nothing that counts: the best arm, {arm}, differs from the base by no more than {delta} in {title} ({change}, {narrow} interval {low} to {high}).",
        "unclear": "No clear gain: the best arm, {arm}, differs from the base by {change} in {title} ({confidence} interval {low} to {high}); {needed}.",
        "alone": "{title}: {arm} reaches {figure}.",
        "wins": "{title}: {arm} is better than {other} by {gap} ({confidence} interval {low} to {high}).",
        "equal": "{title}: {arm} and {other} do not differ by more than {delta} ({arm} minus {other} {change}, {narrow} interval {low} to {high}).",
        "open": "{title}: whether {arm} or {other} is better stays open ({arm} minus {other} {change}, {confidence} interval {low} to {high}); {needed}.",
        "unpaired": "{title}: {arm} reaches {figure}, {other} {other_figure}; they were not compared row by row.",
        "first": "{title}: {arm} comes first with {figure}",
        "better than": ", better than {arms}",
        "equal to": ", no more than {delta} apart from {arms}",
        "open against": ", not told apart from {arms} ({needed})",
        "and stop": ".",
        "amount": "{arm} {figure}",
        "over base": ", {change} over the base ({low} to {high})",
        "kept": ", keeps {kept} of general ability",
        "below floor": " (below the floor of {floor})",
        "ratio": "{arm} needs {memory} × the memory, {seconds} × the time and {disk} × the disk of {other}.",
        "conditions": "{model}, {task}: {train} training rows, {measured} test rows, {seeds}, {steps} steps of {batch} rows, {precision}",
        "delta": "; differences below {delta} count as none",
        "budget": "; {seconds} of a budget of {budget}",
        "in all": "; {seconds} in all",
        "left out": ", left out for it: {items}",
        "one seed": "one seed",
        "seeds": "{n} seeds",
        "and": ", ",
        "between": "; ",
        "last": " and ",
        "space": " ",
        "stop": ".",
    },
    "zh": {
        "none": "没有任何方法得到数值：所有训练都发散了。",
        "fitted": "没有任何一步微调在验证集上优于此前的闭式拟合，仅凭拟合即达到 {figure}（{title}）。",
        "cheap wins": "此处不值得微调：{baseline}不经微调即达到 {figure}，而最好的微调方法（{arm}）为 {tuned}（{title}）。",
        "cheap as well": "廉价方法同样好：{baseline}不经微调即达到 {figure}，最好的微调方法（{arm}）为 {tuned}（{title}；小于 {delta} 的差异视为没有差异）。",
        "cheap loses": "最好的廉价方法（{baseline}）达到 {figure}。",
        "hurts": "微调有害：最好的方法（{arm}）的{title}比基座模型差 {gap}（{confidence} 区间 {low} 至 {high}）。",
        "no effect": "微调没有带来有意义的变化：最好的方法（{arm}）与基座模型的{title}相差不超过 {delta}（{change}，{narrow} 区间 {low} 至 {high}）。",
        "unclear": "没有明确的收益：最好的方法（{arm}）与基座模型的{title}相差 {change}（{confidence} 区间 {low} 至 {high}）；{needed}。",
        "alone": "{title}：{arm} 达到 {figure}。",
        "wins": "{title}：{arm} 优于 {other}，差距 {gap}（{confidence} 区间 {low} 至 {high}）。",
        "equal": "{title}：{arm} 与 {other} 相差不超过 {delta}（{arm} 减 {other} 为 {change}，{narrow} 区间 {low} 至 {high}）。",
        "open": "{title}：{arm} 与 {other} 孰优尚无定论（{arm} 减 {other} 为 {change}，{confidence} 区间 {low} 至 {high}）；{needed}。",
        "unpaired": "{title}：{arm} 达到 {figure}，{other} 达到 {other_figure}；两者未逐行比较。",
        "first": "{title}：{arm} 领先，达到 {figure}",
        "better than": "，优于 {arms}",
        "equal to": "，与 {arms} 相差不超过 {delta}",
        "open against": "，与 {arms} 尚无法区分（{needed}）",
        "and stop": "。",
        "amount": "{arm} {figure}",
        "over base": "，比基座模型 {change}（{low} 至 {high}）",
        "kept": "，保住 {kept} 的通用能力",
        "below floor": "（低于下限 {floor}）",
        "ratio": "{arm} 所需内存、时间和磁盘分别为 {other} 的 {memory}、{seconds} 和 {disk} 倍。",
        "conditions": "{model}，{task}：{train} 行训练数据，{measured} 行测试数据，{seeds}，{steps} 步、每步 {batch} 行，{precision}",
        "delta": "；小于 {delta} 的差异视为没有差异",
        "budget": "；用时 {seconds}，预算 {budget}",
        "in all": "；共用时 {seconds}",
        "left out": "，因此省去：{items}",
        "one seed": "1 个随机种子",
        "seeds": "{n} 个随机种子",
        "and": "、",
        "between": "；",
        "last": "和",
        "space": "",
        "stop": "。",
    },
}
_BETWEEN_HAN = re.compile(r"(?<=[\u4e00-\u9fff]) (?=[\u4e00-\u9fff])")
SHOWN = 4
"""Most arms whose figures are said; the page has all."""


@dataclass(frozen=True, slots=True)
class Beside:
    """The best arm minus another: the ends of both intervals, and what they say of the best."""

    other: str
    value: float
    ends: tuple[float, float]
    narrow: tuple[float, float]
    verdict: str
    pair: Pair


def finding(view: View) -> tuple[str, ...]:
    """Three lines: the answer, the amounts, the conditions."""
    return tuple(_tightened(line) for line in _lines(view))


def _lines(view: View) -> tuple[str, ...]:
    say = WORDS[view.voice.language]
    if not view.ranked():
        return say["none"], _conditions(view)
    fitted = _fitted(view)
    headlines = [line for line in (_cheap(view), _over_base(view), fitted or _between(view)) if line]
    second = [*headlines[1:], _amounts(view), _ratio(view), "" if _cheap(view) else _cheap_loses(view)]
    return headlines[0], say["space"].join(line for line in second if line), _conditions(view)


def _tightened(line: str) -> str:
    """No space between two Chinese characters: a name beside them may be Chinese or not."""
    return _BETWEEN_HAN.sub("", line)


def beside(view: View, best: Arm, other: str) -> Beside | None:
    """The best arm beside another or the base, on the primary measure; None where they were not compared."""
    turned = {"better": "worse", "worse": "better"}
    pair = view.pair(other, best.name)
    if pair is not None:
        d = pair.difference
        return Beside(other, d.value, (d.low, d.high), (d.narrow_low, d.narrow_high), pair.verdict, pair)
    pair = view.pair(best.name, other)
    if pair is None:
        return None
    d = pair.difference
    verdict = turned.get(pair.verdict, pair.verdict)
    return Beside(other, -d.value, (-d.high, -d.low), (-d.narrow_high, -d.narrow_low), verdict, pair)


def _fitted(view: View) -> str:
    """That every training of every arm kept its start; "" where one learnt something."""
    if any(cell.best_step for arm in view.found.arms for cell in arm.cells):
        return ""
    figure = view.voice.amount(view.ranked()[0].figures[view.found.primary].value, view.unit)
    return _say(view, "fitted", figure=figure)


def _cheap(view: View) -> str:
    """That a cheap way does as well or better than every tuned arm; "" where none does."""
    cheap, best = view.baselines(), view.ranked()[0]
    if not cheap:
        return ""
    baseline, figure = cheap[0]
    tuned = best.figures[view.found.primary].value
    ahead = (figure.value - tuned) * (1 if view.is_higher_better else -1)
    if ahead < -view.found.delta:
        return ""
    return _say(
        view,
        "cheap wins" if ahead > view.found.delta else "cheap as well",
        baseline=view.voice.baseline(baseline),
        figure=view.voice.amount(figure.value, view.unit),
        arm=view.called(best.name),
        tuned=view.voice.amount(tuned, view.unit),
    )


def _cheap_loses(view: View) -> str:
    cheap = view.baselines()
    if not cheap:
        return ""
    baseline, figure = cheap[0]
    amount = view.voice.amount(figure.value, view.unit)
    return _say(view, "cheap loses", baseline=view.voice.baseline(baseline), figure=amount)


def _over_base(view: View) -> str:
    """That not even the best arm is better than the base; "" where one is, or there is no base."""
    best = view.ranked()[0]
    found = beside(view, best, BASE)
    if found is None or found.verdict == "better":
        return ""
    key = {"worse": "hurts", "equivalent": "no effect", "inconclusive": "unclear"}[found.verdict]
    return _told(view, key, best, found)


def _between(view: View) -> str:
    best, *others = view.ranked()
    figure = view.voice.amount(best.figures[view.found.primary].value, view.unit)
    if not others:
        return _say(view, "alone", arm=view.called(best.name), figure=figure)
    found = [beside(view, best, other.name) for other in others]
    if len(others) > 1:
        return _among(view, best, [one for one in found if one is not None])
    only = found[0]
    if only is None:
        amount = view.voice.amount(others[0].figures[view.found.primary].value, view.unit)
        other = view.called(others[0].name)
        return _say(view, "unpaired", arm=view.called(best.name), figure=figure, other=other, other_figure=amount)
    if only.verdict == "worse":  # the paired means order the arms otherwise than their own figures do
        turned = beside(view, others[0], best.name)
        return _told(view, "wins", others[0], turned) if turned else ""
    return _told(view, {"better": "wins", "equivalent": "equal"}.get(only.verdict, "open"), best, only)


def _among(view: View, best: Arm, found: Sequence[Beside]) -> str:
    """The first of three arms or more, and how sure it is of that."""
    say = WORDS[view.voice.language]
    figure = view.voice.amount(best.figures[view.found.primary].value, view.unit)
    told = _say(view, "first", arm=view.called(best.name), figure=figure)
    for key, verdict in (("better than", "better"), ("equal to", "equivalent"), ("open against", "inconclusive")):
        those = [one for one in found if one.verdict == verdict]
        if those:
            arms = listed([view.called(one.other) for one in those], say)
            told += _say(
                view,
                key,
                arms=arms,
                needed=needed(view, those[0].pair) if len(those) == 1 else _all_needed(view, those),
            )
    return told + say["and stop"]


def _all_needed(view: View, those: Sequence[Beside]) -> str:
    """What would settle the pair that needs most."""
    return needed(view, max((one.pair for one in those), key=lambda pair: pair.rows_needed or math.inf))


def _told(view: View, key: str, best: Arm, found: Beside) -> str:
    unit, voice = view.unit, view.voice
    low, high = found.narrow if key in {"equal", "no effect"} else found.ends
    if key in {"wins", "hurts"}:
        low, high = sorted((abs(low), abs(high)))
    signed = key not in {"wins", "hurts"}
    ends_said = voice.ends(low, high, unit, signed=signed)
    return _say(
        view,
        key,
        arm=view.called(best.name),
        other=view.called(found.other),
        change=voice.change(found.value, unit),
        gap=voice.distance(found.value, unit),
        low=ends_said[0],
        high=ends_said[1],
        needed=needed(view, found.pair),
    )


def _amounts(view: View) -> str:
    """Each arm's figure, gain and what it kept, the best first."""
    say = WORDS[view.voice.language]
    return say["between"].join(_amount(view, arm) for arm in view.ranked()[:SHOWN]) + say["stop"]


def _amount(view: View, arm: Arm) -> str:
    told = _say(
        view,
        "amount",
        arm=view.called(arm.name),
        figure=view.voice.amount(arm.figures[view.found.primary].value, view.unit),
    )
    found = beside(view, arm, BASE)
    if found is not None and math.isfinite(found.value):
        low, high = view.voice.ends(*found.ends, view.unit, signed=True)
        told += _say(view, "over base", change=view.voice.change(found.value, view.unit), low=low, high=high)
    kept = known(arm.kept)
    if kept is not None:
        told += _say(view, "kept", kept=view.voice.amount(kept.value, "share"))
        if view.found.floor is not None and kept.value < view.found.floor:
            told += _say(view, "below floor", floor=view.voice.amount(view.found.floor, "share"))
    return told


def _ratio(view: View) -> str:
    """Of two arms, what the one that takes less memory costs against the other."""
    arms = view.ranked()
    if len(arms) != 2:
        return ""
    less, more = sorted(arms, key=lambda arm: arm.predicted.peak_memory_bytes_measured)
    costs: dict[str, tuple[float, float]] = {
        "memory": (less.predicted.peak_memory_bytes_measured, more.predicted.peak_memory_bytes_measured),
        "seconds": (mean(less, lambda cell: cell.seconds), mean(more, lambda cell: cell.seconds)),
        "disk": (less.bytes_on_disk, more.bytes_on_disk),
    }
    if not all(one > 0 and other > 0 for one, other in costs.values()):
        return ""
    ratios = {key: number(float(f"{one / other:.2g}")) for key, (one, other) in costs.items()}
    return _say(view, "ratio", arm=view.called(less.name), other=view.called(more.name), **ratios)


def _conditions(view: View) -> str:
    found, voice, say = view.found, view.voice, WORDS[view.voice.language]
    seeds = say["one seed"] if len(found.seeds) == 1 else say["seeds"].format(n=len(found.seeds))
    told = say["conditions"].format(
        model=found.model,
        task=found.task,
        train=voice.count(found.rows_train),
        measured=voice.count(found.rows_measured),
        seeds=seeds,
        steps=voice.count(found.steps),
        batch=voice.count(found.batch_size),
        precision=found.precision,
    )
    told += _say(view, "delta")
    if found.budget_seconds is None:
        told += say["in all"].format(seconds=voice.seconds(found.seconds))
    else:
        budget = voice.seconds(found.budget_seconds)
        told += say["budget"].format(seconds=voice.seconds(found.seconds), budget=budget)
    if found.shrunk:
        told += say["left out"].format(items=say["and"].join(found.shrunk))
    return told + say["stop"]


def listed(items: Sequence[str], say: dict[str, str]) -> str:
    """The items with commas, the last with its conjunction."""
    *most, last = items
    return say["and"].join(most) + say["last"] + last if most else last


def _say(view: View, key: str, **values: str) -> str:
    """A sentence with its blanks filled; what every sentence may name is known."""
    voice, found = view.voice, view.found
    known_values = {
        "title": view.measure(found.primary),
        "delta": voice.distance(found.delta, view.unit),
        "confidence": voice.coverage(found.confidence),
        "narrow": voice.coverage(1 - 2 * (1 - found.confidence)),
    }
    return WORDS[voice.language][key].format(**known_values | values)
