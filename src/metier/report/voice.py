"""How figures and texts are said in one language."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from metier.report.words import (
    BASELINES_ZH,
    MEASURES_ZH,
    PARTS_ZH,
    PHASES_ZH,
    VALUE_MEASURES_ZH,
    WHY_ZH,
    WORDS,
    Language,
)

if TYPE_CHECKING:
    from metier.core.evidence import Baseline, Measure

_VALUE_TITLE = re.compile(r"(?P<what>.+?)(?: per (?P<part>[^,]+))?(?:, (?P<rows>.+))?")
"""Such as "Pearson per protein, pretraining set"."""


@dataclass(frozen=True, slots=True)
class Voice:
    """Says the report's texts and figures in one language."""

    language: Language

    def say(self, key: str, **values: object) -> str:
        """The text of a key with its blanks filled."""
        return WORDS[self.language][key].format(**values)

    def measure(self, measure: Measure) -> str:
        """What a reader calls a measure; the evidence's own title where there is no translation."""
        return self.measure_title(measure.name, measure.title)

    def measure_title(self, name: str, title: str) -> str:
        """The same by the key and the title of a measure."""
        if self.language == "en":
            return title
        # Titles of numbers first: what they drift from shares its name with the drift of embeddings.
        return _value_title_zh(title) or MEASURES_ZH.get(name, title)

    def part(self, by: str) -> str:
        """What a reader calls a target or a grouping of rows."""
        return PARTS_ZH.get(by, by) if self.language == "zh" else by.replace("_", " ")

    def why(self, note: str) -> str:
        """Why a part has no figure."""
        return WHY_ZH.get(note, note) if self.language == "zh" else note

    def baseline(self, baseline: Baseline) -> str:
        """What a reader calls a baseline."""
        return self._baseline(baseline)[0]

    def baseline_how(self, baseline: Baseline) -> str:
        """What was done for a baseline."""
        return self._baseline(baseline)[1]

    def _baseline(self, baseline: Baseline) -> tuple[str, str]:
        own = (baseline.title, baseline.how)
        return BASELINES_ZH.get(baseline.name, own) if self.language == "zh" else own

    def phase(self, name: str) -> str:
        """What a reader calls a phase."""
        return PHASES_ZH.get(name, name) if self.language == "zh" else name

    def amount(self, value: float, unit: str) -> str:
        """A figure by its unit: a share in percent, nats to three decimals, ratios to two, scores to three digits."""
        text = _digits(value, unit)
        return f"{text} %" if unit == "share" else text

    def change(self, value: float, unit: str) -> str:
        """A difference, always with its sign; shares differ by percentage points."""
        text = _digits(value, unit, signed=True)
        return f"{text} {self.say('points')}" if unit == "share" else text

    def distance(self, value: float, unit: str) -> str:
        """A difference without its sign."""
        return self.change(abs(value), unit).removeprefix("+")

    def interval(self, low: float, high: float, unit: str, *, signed: bool = False) -> str:
        """Both ends of an interval."""
        ends = f" {self.say('to')} ".join(self.ends(low, high, unit, signed=signed))
        return f"{ends} %" if unit == "share" and not signed else ends

    def ends(self, low: float, high: float, unit: str, *, signed: bool = False) -> tuple[str, str]:
        """Each end of an interval, without its unit; both with as many decimals."""
        places = _score_places(low, high, signed=signed) if unit == "score" else None
        return _digits(low, unit, signed=signed, places=places), _digits(high, unit, signed=signed, places=places)

    def seconds(self, seconds: float) -> str:
        """A time span in its two largest units: 0.42 s, 5.2 s, 3 min 12 s, 2 h 5 min."""
        hour, minute, second = ("小时", "分", "秒") if self.language == "zh" else ("h", "min", "s")
        if seconds < 59.95:
            return f"{seconds:.{2 if 0 < seconds < 1 else 1}f} {second}"
        whole = round(seconds)
        if whole < 3600:
            return f"{whole // 60} {minute} {whole % 60} {second}"
        return f"{whole // 3600:,} {hour} {whole % 3600 // 60} {minute}"

    def size(self, count: float) -> str:
        """Bytes in decimal units, as disks and the Hub count them: 3.9 GB."""
        for unit in ("B", "kB", "MB", "GB"):
            if abs(count) < 999.95:
                return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
            count /= 1000
        return f"{count:,.1f} TB"

    def parameters(self, count: int) -> str:
        """How many numbers a network holds: 134.5 M."""
        for size, word in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
            if count >= size:
                return f"{count / size:.1f} {word}"
        return str(count)

    def count(self, count: int) -> str:
        """A whole number with thousands separators."""
        return f"{count:,}"

    def coverage(self, confidence: float) -> str:
        """How sure an interval is: 95 %."""
        return f"{confidence * 100:.4g} %"

    def rows(self, n: int) -> str:
        """How many rows stand behind a figure."""
        return self.say("row") if n == 1 else self.say("rows", n=self.count(n))


def plain(text: str) -> str:
    """The text with an ASCII minus: not every console can print the typographic one."""
    return text.replace("−", "-")


def _digits(value: float, unit: str, *, signed: bool = False, places: int | None = None) -> str:
    if not math.isfinite(value):
        return {"inf": "∞", "-inf": "−∞"}.get(str(value), "?")
    scaled = value * 100 if unit == "share" else value
    if places is None:
        places = _score_places(value, signed=signed) if unit == "score" else {"share": 1, "ratio": 2}.get(unit, 3)
    sign = "+" if signed else ""
    size = abs(scaled)
    if unit == "share" and not signed and 0 < scaled < 0.05:
        return "<0.1"
    if unit != "share" and (0 < size < 10.0**-places / 2 or size >= 1e6):
        return _powers(f"{scaled:{sign}.{0 if size < 1 else 2}e}")
    # Adding zero turns a rounded -0.0 into 0.0.
    return f"{round(scaled, places) + 0.0:{sign},.{0 if size >= 1e4 else places}f}".replace("-", "−")


def _score_places(*values: float, signed: bool) -> int:
    """Decimals that give the largest figure three digits: scores have no common size, as errors have their target's.

    A difference of a hundredth or more needs no more than the three decimals that correlations have.
    """
    size = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    if size == 0 or (signed and 0.01 <= size < 1):
        return 3
    return min(6, max(0, 2 - math.floor(math.log10(float(f"{size:.3g}")))))


def _value_title_zh(title: str) -> str | None:
    found = _VALUE_TITLE.fullmatch(title)
    if found is None or found["what"] not in VALUE_MEASURES_ZH:
        return None
    over = [f"按{PARTS_ZH.get(found['part'], found['part'])}"] if found["part"] else []
    over += [PARTS_ZH.get(found["rows"], found["rows"])] if found["rows"] else []
    return VALUE_MEASURES_ZH[found["what"]] + (f"（{'，'.join(over)}）" if over else "")


def _powers(text: str) -> str:
    mantissa, exponent = text.split("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "−")
