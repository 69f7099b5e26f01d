"""Rows in, records out: every format read, every fault named with its line, splits that share nothing.

`read` serves a run, `look` serves whoever writes a recipe; `records` holds the four shapes that a row can have.
"""

from metier.data.formats import formats_for
from metier.data.preview import Look, look
from metier.data.questions import read_questions
from metier.data.reader import read
from metier.data.records import (
    Cell,
    Cells,
    Columns,
    Completion,
    Conversation,
    Document,
    Labelled,
    Message,
    Record,
    Splits,
)

__all__ = [
    "Cell",
    "Cells",
    "Columns",
    "Completion",
    "Conversation",
    "Document",
    "Labelled",
    "Look",
    "Message",
    "Record",
    "Splits",
    "formats_for",
    "look",
    "read",
    "read_questions",
]
