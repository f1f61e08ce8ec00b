"""Decides and acts: admission, launching, reconciliation, retries. Knows a `Launcher`, neither Ray nor torch."""

from service.scheduler.decide import Decision, decide
from service.scheduler.launcher import ClusterCapacity, Launcher, LaunchState, NodeResources, Observation
from service.scheduler.placement import admit, placement_problems
from service.scheduler.scheduler import Scheduler
from service.scheduler.scripted import ScriptedLauncher

__all__ = [
    "ClusterCapacity",
    "Decision",
    "LaunchState",
    "Launcher",
    "NodeResources",
    "Observation",
    "Scheduler",
    "ScriptedLauncher",
    "admit",
    "decide",
    "placement_problems",
]
