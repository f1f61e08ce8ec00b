"""Decides and acts: admission, launching, reconciliation, retries. Knows a `Launcher`, neither Ray nor torch."""

from service.scheduler.admission import Admission, QuotaOf, Waiting, admit, unlimited
from service.scheduler.decide import Decision, Evidence, decide, passed_deadline, within_budget
from service.scheduler.launcher import ClusterCapacity, Launcher, LaunchState, NodeResources, Observation
from service.scheduler.placement import placement_problems
from service.scheduler.scheduler import Scheduler
from service.scheduler.scripted import ScriptedLauncher

__all__ = [
    "Admission",
    "ClusterCapacity",
    "Decision",
    "Evidence",
    "LaunchState",
    "Launcher",
    "NodeResources",
    "Observation",
    "QuotaOf",
    "Scheduler",
    "ScriptedLauncher",
    "Waiting",
    "admit",
    "decide",
    "passed_deadline",
    "placement_problems",
    "unlimited",
    "within_budget",
]
