"""An experiment that compared several ways to tune: its page, its answer in three lines, its table for a terminal."""

from metier.report.experiment.finding import finding
from metier.report.experiment.interference import interference_page
from metier.report.experiment.page import experiment_page
from metier.report.experiment.terminal import table
from metier.report.experiment.view import View

__all__ = ["View", "experiment_page", "finding", "interference_page", "table"]
