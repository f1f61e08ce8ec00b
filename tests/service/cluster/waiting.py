"""Waiting for the world to become so."""

import time
from collections.abc import Callable
from typing import TypeVar

import psutil

_Value = TypeVar("_Value")


def wait_until(look: Callable[[], _Value], timeout_s: float, what: str) -> _Value:
    """The first true answer of ``look``; AssertionError naming ``what`` if none comes in time."""
    deadline = time.monotonic() + timeout_s
    while not (value := look()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)
    return value


def is_gone(pid: int) -> bool:
    """Whether no process ``pid`` runs; a zombie does not run."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
