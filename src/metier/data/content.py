"""What a record says: the side that asks, the side that answers, and the text both are compared by."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator
from typing import assert_never

from metier.data.records import Cell, Columns, Completion, Conversation, Document, Labelled, Record

SHORT_PROMPT_WORDS = 5
"""A prompt of fewer words says too little to know a row by: its completion is compared as well."""

UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Scripts written without spaces between words: Thai, Lao, Burmese, Khmer, kana and Han."""
_UNSPACED = re.compile(f"[{UNSPACED}]")
_CJK = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]")
_LETTER = re.compile(r"[^\W\d_]")

# Signs that carry arithmetic stay: "2 + 3" is not "2 - 3", nor is 3.5 the same as 35.
_PUNCTUATION = re.compile(
    r"[!?;\"()\[\]{}_…“”«»。、「」『』《》〈〉【】〔〕—–‐・·¿¡`]|(?<!\d)[.,:]|[.,:](?!\d)|-(?!\s*\d)"
)
_APOSTROPHES = re.compile("['’‘]")


def asked(record: Record) -> str:
    """The side that asks: what the rows of a test must not share with the rows of training.

    That is the user's turns of a conversation without the system prompt, the prompt of a completion (with its
    completion where the prompt is shorter than 5 words), and the text of anything else; of a row of the user's own, a
    digest of the whole.
    """
    match record:
        case Conversation():
            return "\n".join(turn.content for turn in record.messages if turn.role == "user")
        case Completion():
            short = words_in(record.prompt) < SHORT_PROMPT_WORDS
            return f"{record.prompt}\n{record.completion}" if short else record.prompt
        case Document() | Labelled():
            return record.text
        case Columns():
            return _digest(record)
        case Cell():
            return record.where
        case _:
            assert_never(record)


def before_answer(record: Record) -> str:
    """The text that stands directly before the answer; empty where there is no answer."""
    match record:
        case Conversation():
            return record.messages[-2].content if len(record.messages) > 1 else ""
        case Completion():
            return record.prompt
        case Document() | Labelled() | Columns() | Cell():
            return ""
        case _:
            assert_never(record)


def answer(record: Record) -> str | None:
    """The last reply, the completion or the label; None for plain text."""
    match record:
        case Conversation():
            return record.messages[-1].content
        case Completion():
            return record.completion
        case Labelled():
            return record.label
        case Document() | Columns() | Cell():
            return None
        case _:
            assert_never(record)


def texts(record: Record) -> Iterator[str]:
    """Every text of a record that a model would read."""
    match record:
        case Conversation():
            yield from (turn.content for turn in record.messages)
        case Completion():
            yield from (record.prompt, record.completion)
        case Document() | Labelled():
            yield record.text
        case Columns():
            yield from (value for value in record.values.values() if isinstance(value, str))
        case Cell():
            return
        case _:
            assert_never(record)


def _digest(record: Columns) -> str:
    """Rows of a user's own are compared whole and word for word: what makes two of them alike, only the user knows."""
    said = json.dumps(dict(record.values), ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()


def normalised(text: str) -> str:
    """The text in NFKC and lower case, without punctuation, with single spaces."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(_PUNCTUATION.sub(" ", _APOSTROPHES.sub("", folded)).split())


def digest(text: str) -> int:
    """64 bits of a text: among a million texts two differ but share them with a chance of 3 in 100 million."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def words_in(text: str) -> int:
    """How many words a text has; of scripts without spaces two characters count as one."""
    unspaced = len(_UNSPACED.findall(text))
    return unspaced // 2 + len(_UNSPACED.sub(" ", text).split()) if unspaced else len(text.split())


def is_unspaced(text: str) -> bool:
    """Whether most letters belong to a script written without spaces."""
    found = 0 if text.isascii() else len(_UNSPACED.findall(text))
    return found > 0 and 2 * found > len(_LETTER.findall(text))


def cjk_share(text: str) -> float:
    """Share of Chinese, Japanese and Korean characters among the letters, 0 to 1."""
    letters = len(_LETTER.findall(text))
    return min(1.0, len(_CJK.findall(text)) / letters) if letters else 0.0
