"""What `metier chat` does: one answer, or a conversation until the input ends."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from metier import api
from metier.run import load_base

if TYPE_CHECKING:
    from metier.run import Specialist


def hold(run: Path, *, message: str | None, base: bool, as_json: bool) -> None:
    """Answer `message`, or every line of stdin; with `base`, the untuned model answers as well."""
    tuned = api.load(run)
    if not tuned.replies:
        tuned.chat("")
    untuned = load_base(tuned.recipe) if base else None
    if message is not None:
        _answer(tuned, untuned, [{"role": "user", "content": message}], as_json=as_json)
        return
    asks = sys.stdin.isatty()
    turns: list[dict[str, str]] = []
    while True:
        if asks:
            sys.stderr.write("you> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            turns.append({"role": "user", "content": line.strip()})
            turns.append({"role": "assistant", "content": _answer(tuned, untuned, turns, as_json=as_json)})


def _answer(tuned: Specialist, untuned: Specialist | None, turns: list[dict[str, str]], *, as_json: bool) -> str:
    asked = turns if tuned.task.kind == "chat" else turns[-1]["content"]
    answer = tuned.chat(asked)
    before = untuned.chat(asked) if untuned else None
    if as_json:
        found = {"tuned": answer} if before is None else {"base": before, "tuned": answer}
        sys.stdout.write(json.dumps(found, ensure_ascii=False) + "\n")
    elif before is None:
        sys.stdout.write(f"{answer}\n")
    else:
        sys.stdout.write(f"base>  {before}\ntuned> {answer}\n")
    sys.stdout.flush()
    return answer
