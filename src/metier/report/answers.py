"""Answers side by side: sorted by who was right, shortened, with what differs from the expected text marked."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from metier.core.evidence import Answer

GROUPS = ("win", "loss_group", "both_wrong", "both_right", "wrong", "right", "unjudged")
"""Every group, in the order of the page: what changed comes first."""
SHORT = 700
"""Characters of a text that are shown at once."""
MISSING = 60
"""Most characters of a missing piece that are shown."""
_ALIKE = 0.35
"""Below this similarity nothing is marked, for everything would be."""
_WORD = re.compile(r"\s+|[A-Za-z0-9_\u00C0-\u024F]+|.", re.DOTALL)
_BIDI = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C}


@dataclass(frozen=True, slots=True)
class Text:
    """A text as the page shows it.

    Attributes:
        short: Its beginning, differences marked.
        whole: All of it, where `short` is not.
        length: Characters of the whole.
    """

    short: Markup
    whole: str | None
    length: int


@dataclass(frozen=True, slots=True)
class Pair:
    """One row of the page.

    Attributes:
        answer: The row itself.
        prompt: What was asked.
        reference: What was expected.
        before: The base model's answer.
        after: The tuned model's answer.
    """

    answer: Answer
    prompt: Text
    reference: Text
    before: Text | None
    after: Text


def group(answer: Answer) -> str:
    """Which of `GROUPS` a row belongs to."""
    if answer.after_right is None or (answer.before is not None and answer.before_right is None):
        return "unjudged"
    if answer.before is None:
        return "right" if answer.after_right else "wrong"
    table = {
        (False, True): "win",
        (True, False): "loss_group",
        (True, True): "both_right",
        (False, False): "both_wrong",
    }
    return table[bool(answer.before_right), answer.after_right]


def grouped(answers: Sequence[Answer], *, mark: bool = True) -> dict[str, list[Pair]]:
    """The rows by group, without empty groups; `mark` marks what differs, which of numbers is all of them."""
    found: dict[str, list[Pair]] = {name: [] for name in GROUPS}
    for answer in answers:
        found[group(answer)].append(_pair(answer, mark=mark))
    return {name: pairs for name, pairs in found.items() if pairs}


def visible(text: str) -> str:
    """The text with control characters as their pictures and direction marks as their code points.

    Nothing in an answer can then hide, reorder or cut the page. Source: Unicode 16, Control Pictures (U+2400).
    """
    return "".join(_seen(character) for character in text.replace("\r\n", "\n"))


def marked(text: str, reference: str) -> Markup:
    """The text with what differs from the reference marked, word by word (character by character in Chinese)."""
    words, wanted = _WORD.findall(text), _WORD.findall(reference)
    matcher = difflib.SequenceMatcher(None, wanted, words, autojunk=False)
    # The quick ratio is an upper bound that costs a thousandth.
    if text == reference or not reference or matcher.quick_ratio() < _ALIKE or matcher.ratio() < _ALIKE:
        return escape(text)
    return Markup("").join(_pieces(matcher, words, wanted))


def _pair(answer: Answer, *, mark: bool) -> Pair:
    reference = visible(answer.reference)
    wanted = reference if mark else ""
    return Pair(
        answer=answer,
        prompt=text_of(visible(answer.prompt)),
        reference=text_of(reference),
        before=None if answer.before is None else text_of(visible(answer.before), wanted),
        after=text_of(visible(answer.after), wanted),
    )


def text_of(text: str, reference: str = "") -> Text:
    """A text as the page shows it, what differs from the reference marked where one is given."""
    if len(text) <= SHORT:
        return Text(marked(text, reference[:SHORT]), None, len(text))
    return Text(marked(text[:SHORT], reference[:SHORT]) + "…", text, len(text))


def _pieces(matcher: difflib.SequenceMatcher[str], words: Sequence[str], wanted: Sequence[str]) -> Iterator[Markup]:
    for kind, first, last, start, end in matcher.get_opcodes():
        here, missing = "".join(words[start:end]), "".join(wanted[first:last])
        if kind == "equal":
            yield escape(here)
            continue
        if missing.strip():
            yield Markup("<del>{}</del>").format(missing if len(missing) <= MISSING else missing[:MISSING] + "…")
        yield Markup("<mark>{}</mark>").format(here) if here.strip() else escape(here)


def _seen(character: str) -> str:
    if character in "\n\t":
        return character
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    if code in _BIDI or unicodedata.category(character) in {"Cc", "Cs"}:
        return f"⟨U+{code:04X}⟩"
    return character
