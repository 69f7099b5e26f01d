"""Conversations to text by a model's own template, in a process that has neither time nor memory to waste."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metier.core import DataError, UnsafeError
from metier.core.children import begin

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

SECONDS = 10
"""A template takes less than a thousandth of one."""
MEGABYTES = 1024
MOST_LETTERS = 16 << 20
WORKER = Path(__file__).with_name("template_worker.py")


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    opening: bool = False,
) -> str:
    """The text of a conversation, as `tokenizer.apply_chat_template(turns, tokenize=False)` gives it.

    Args:
        tokenizer: Brings the template and the special tokens.
        turns: The messages, each with role and content.
        tools: What the model may call, as JSON schemas.
        opening: Whether the text ends where the model is to answer.

    Raises:
        DataError: If the template refuses the conversation, or is no template.
        UnsafeError: If it reaches for Python's insides, or does not come to an end within seconds and memory.
    """
    asked: Any = tokenizer
    template = asked.get_chat_template(None, tools)
    variables = {
        **{name: _plain(value) for name, value in asked.special_tokens_map.items()},
        "messages": [{name: value for name, value in turn.items() if value is not None} for turn in turns],
        "tools": tools,
        "documents": None,
        "add_generation_prompt": opening,
    }
    told = _WORKER.ask(template, variables)
    if "text" in told:
        return told["text"]
    raise _fault(told)


def _plain(value: Any) -> Any:
    return list(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _fault(told: Mapping[str, str]) -> DataError | UnsafeError:
    said = " ".join(told["error"].split())[:300]
    match told["kind"]:
        case "refused":
            hint = "check the order of roles, or give another template by task.template"
            return DataError(f"the chat template refuses this conversation: {said}", where="chat template", hint=hint)
        case "unsafe":
            what = f"it reaches for what no template needs: {said}"
        case _:
            bounds = f"{SECONDS} seconds, {MEGABYTES:,} megabytes and {MOST_LETTERS:,} letters"
            what = f"it asks for too much {said}; a conversation has {bounds}"
    hint = "the model brings it; read it, or give another by task.template"
    return UnsafeError(what, where="chat template", hint=hint)


class _Worker:
    """The one process that renders, begun when it is first needed and begun again after it was stopped."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._of, self._lock = 0, threading.Lock()

    def ask(self, template: str, variables: Mapping[str, Any]) -> dict[str, str]:
        """What the process answers; that it took too long where it gives none."""
        question = json.dumps([template, variables], default=str).encode() + b"\n"
        with self._lock:
            process = self._running()
            if process.stdin is None or process.stdout is None:
                raise AssertionError("the worker has no pipes")
            try:
                process.stdin.write(question)
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = b""
            if not line:
                self.close()
                return {"kind": "endless", "error": "time or memory"}
        found: dict[str, str] = json.loads(line)
        return found

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None and self._of == os.getpid():
            process.kill()
            process.communicate()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._of != os.getpid() or self._process.poll() is not None:
            self.close()
            self._process = begin(WORKER, SECONDS, MEGABYTES, MOST_LETTERS)
            self._of = os.getpid()
        return self._process


_WORKER = _Worker()
atexit.register(_WORKER.close)
