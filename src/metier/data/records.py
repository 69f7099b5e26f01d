"""The four shapes a row can have once it is read, whatever file and format it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns; the assistant's are what is learnt.

    Attributes:
        where: File and line, such as "train.jsonl:12".
        messages: The turns in order.
        tools: Tool definitions as JSON text, put to the chat template; None where there are none.
        extras: The row's other columns, such as "test" (unit-test code) or the group column.
    """

    where: str
    messages: tuple[Message, ...]
    tools: str | None = None
    extras: Mapping[str, Any] = field(default_factory=lambda: NOTHING)


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and what should follow it."""

    where: str
    prompt: str
    completion: str
    extras: Mapping[str, Any] = field(default_factory=lambda: NOTHING)


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text."""

    where: str
    text: str
    extras: Mapping[str, Any] = field(default_factory=lambda: NOTHING)


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text and its class."""

    where: str
    text: str
    label: str
    extras: Mapping[str, Any] = field(default_factory=lambda: NOTHING)


Record = Conversation | Completion | Document | Labelled


@dataclass(frozen=True, slots=True)
class Splits:
    """Rows to learn from, to choose by, and to be judged on.

    Attributes:
        train: Rows to learn from.
        validation: Rows that choose the best step.
        test: Rows that give the reported figures.
        format: The recognised or given format of the training file.
        reason: How the format was recognised, as a sentence for the user.
        notes: What the reader did or saw that the user should know (rows dropped, personal data, overlap allowed).
        fingerprint: Hex sha256 over the content of all three splits, in order.
    """

    train: tuple[Record, ...]
    validation: tuple[Record, ...]
    test: tuple[Record, ...]
    format: str
    reason: str
    notes: tuple[str, ...]
    fingerprint: str
