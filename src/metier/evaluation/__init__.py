"""What is measured before and after tuning: the domain, and what must not be lost; and how sure it is."""

from metier.evaluation.arms import adjusted, over_seeds, pair, usual_delta
from metier.evaluation.front import front_moved
from metier.evaluation.measured import Measured
from metier.evaluation.metrics import METRICS, check_schema
from metier.evaluation.pack import Item, general_items, read_pack
from metier.evaluation.retention import answered, keeping, kept, token_rows
from metier.evaluation.suite import (
    compare,
    judged,
    measure,
    primary_metric,
    shown_examples,
    side_by_side,
    unjudged,
)

__all__ = [
    "METRICS",
    "Item",
    "Measured",
    "adjusted",
    "answered",
    "check_schema",
    "compare",
    "front_moved",
    "general_items",
    "judged",
    "keeping",
    "kept",
    "measure",
    "over_seeds",
    "pair",
    "primary_metric",
    "read_pack",
    "shown_examples",
    "side_by_side",
    "token_rows",
    "unjudged",
    "usual_delta",
]
