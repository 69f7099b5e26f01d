"""The process in which chat templates are rendered: little memory, no files, and an end after some seconds.

A chat template is a program that comes with a model. jinja's sandbox keeps it away from Python's insides, but neither
from loops without end nor from texts that double; the operating system does. This file is run, never imported.

One request a line, `[template, variables]`; one answer a line, `{"text": ...}` or `{"kind": ..., "error": ...}`.
"""

from __future__ import annotations

import datetime
import faulthandler
import functools
import json
import os
import sys
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from metier.core.children import limit


class Generation(Extension):
    """`{% generation %}` marks what the model writes; the text inside is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012 - how jinja wants it

    def parse(self, parser: Parser) -> nodes.Node:
        """The block, as a call of the text inside."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Any) -> str:
        return str(caller())


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **how: Any) -> str:  # noqa: FBT001, FBT002 - called by templates
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)


def _namespace(*given: Any, **named: Any) -> Namespace:
    if hidden := [name for name in dict(*given, **named) if str(name).startswith("_")]:
        raise SecurityError(f"a namespace may not hold {hidden[0]!r}")
    return Namespace(*given, **named)


def environment() -> ImmutableSandboxedEnvironment:
    """What templates of the Hub are written for: the settings, filters and functions that transformers gives them."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = _to_json
    made.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "namespace": _namespace,
    }
    return made


def answer(template: Any, variables: dict[str, Any], most_letters: int) -> dict[str, str]:
    """The rendered text, or what became of it."""
    try:
        text = template(variables)
    except SecurityError as error:
        return {"kind": "unsafe", "error": str(error)}
    except (MemoryError, OverflowError):
        return {"kind": "endless", "error": "memory"}
    except Exception as error:  # noqa: BLE001 - a template is a program: whatever it raises is about it
        return {"kind": "refused", "error": str(error) or type(error).__name__}
    return {"text": text} if len(text) <= most_letters else {"kind": "endless", "error": "text"}


def main(seconds: float, megabytes: int, most_letters: int) -> None:
    """Answer until nobody asks any more."""
    made = environment()
    limit(megabytes)
    compiled = functools.lru_cache(maxsize=8)(made.from_string)
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
        for line in sys.stdin.buffer:
            template, variables = json.loads(line)
            # A thread of C that ends the process, also in the middle of a multiplication that takes for ever.
            faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
            told = answer(lambda values, text=template: compiled(text).render(values), variables, most_letters)
            faulthandler.cancel_dump_traceback_later()
            sys.stdout.buffer.write(json.dumps(told).encode() + b"\n")
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
