"""How weights move: one loop for every task and every model."""

from metier.training import checkpoint
from metier.training.arms import Arm, Trained, abreast
from metier.training.checkpoint import Origin
from metier.training.compiling import check_compiler, compiled
from metier.training.course import Outcome, Places, run
from metier.training.loop import fit, train_step
from metier.training.metrics import read_metrics
from metier.training.optim import build_optimizer, build_schedule
from metier.training.precision import PURE_BF16_NOTE, Precision, choose
from metier.training.pull import Pull
from metier.training.recomputing import recomputing

__all__ = [
    "PURE_BF16_NOTE",
    "Arm",
    "Origin",
    "Outcome",
    "Places",
    "Precision",
    "Pull",
    "Trained",
    "abreast",
    "build_optimizer",
    "build_schedule",
    "check_compiler",
    "checkpoint",
    "choose",
    "compiled",
    "fit",
    "read_metrics",
    "recomputing",
    "run",
    "train_step",
]
