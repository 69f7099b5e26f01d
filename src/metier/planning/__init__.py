"""What a run would take, before it runs: parameters, bytes, seconds, the rate to begin with, the method to take."""

from metier.planning.any_network import LOOKED_AT, plan_any, saved_bytes
from metier.planning.budget import Budget, Reading, Steps
from metier.planning.machine import Machine, measure_flops_per_second, this_machine
from metier.planning.memory import Memory, Moving, Numbers, Work, peak_memory
from metier.planning.plans import MethodPlan, Plan, plan
from metier.planning.probing import Probe, Sample, confirm, probe
from metier.planning.rates import Choice, highest_rate, learning_rate
from metier.planning.seen import Setting, informed, recall, remember

__all__ = [
    "LOOKED_AT",
    "Budget",
    "Choice",
    "Machine",
    "Memory",
    "MethodPlan",
    "Moving",
    "Numbers",
    "Plan",
    "Probe",
    "Reading",
    "Sample",
    "Setting",
    "Steps",
    "Work",
    "confirm",
    "highest_rate",
    "informed",
    "learning_rate",
    "measure_flops_per_second",
    "peak_memory",
    "plan",
    "plan_any",
    "probe",
    "recall",
    "remember",
    "saved_bytes",
    "this_machine",
]
