"""Machines with a network of their own each, joined by switches whose cables can be pulled: Linux network namespaces.

All of it needs root. A namespace lives as long as the process in it, and takes its end of each cable along.
"""

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

_TIMEOUT_S = 30.0

_WHEN_CABLED = 'echo ready; read -r _; exec "$@"'


class Switch:
    """A network 198.18.``number``.0/24, in which this machine has the address .1 (RFC 2544: of no other use)."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.name = f"syncbn{number}"
        self.address = self.address_of(1)

    def address_of(self, machine: int) -> str:
        return f"198.18.{self.number}.{machine}"

    def pull(self, machine: int) -> None:
        """Cut the machine off: what is sent either way vanishes without a word."""
        _run("ip", "link", "set", _cable(self, machine), "nomaster")

    def plug(self, machine: int) -> None:
        """Bring the machine back."""
        _run("ip", "link", "set", _cable(self, machine), "master", self.name)


@contextmanager
def switches(count: int) -> Iterator[list[Switch]]:
    """So many networks; skips the test where none can be made."""
    made: list[Switch] = []
    try:
        while len(made) < count:
            made.append(_new_switch())
            _run("ip", "addr", "add", f"{made[-1].address}/24", "dev", made[-1].name)
            _run("ip", "link", "set", made[-1].name, "up")
        yield made
    finally:
        for switch in made:
            _run("ip", "link", "del", switch.name)


def _new_switch() -> Switch:
    for number in range(256):
        switch = Switch(number)
        try:
            _run("ip", "link", "add", switch.name, "type", "bridge")
        except (OSError, subprocess.CalledProcessError) as error:
            if b"exists" in getattr(error, "stderr", b""):
                continue  # of a test beside this one
            break
        return switch
    pytest.skip("needs root and the command ip: makes networks of its own")


@contextmanager
def machine(
    number: int, cables: Sequence[Switch], command: Sequence[str], environment: Mapping[str, str], log: Path
) -> Iterator[IO[str]]:
    """What the command writes, run on a machine that is on these networks as ``number``, until it is killed."""
    with (
        log.open("ab") as errors,
        subprocess.Popen(
            ["unshare", "--net", "sh", "-c", _WHEN_CABLED, "sh", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=dict(environment),
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n", log.read_text()
            inside = ["nsenter", "--target", str(process.pid), "--net", "ip"]
            _run(*inside, "link", "set", "lo", "up")
            for switch in cables:
                cable = _cable(switch, number)
                _run("ip", "link", "add", cable, "type", "veth", "peer", "name", f"to{switch.number}")
                _run("ip", "link", "set", f"to{switch.number}", "netns", str(process.pid))
                _run(*inside, "addr", "add", f"{switch.address_of(number)}/24", "dev", f"to{switch.number}")
                _run(*inside, "link", "set", f"to{switch.number}", "up")
                _run("ip", "link", "set", cable, "master", switch.name, "up")
            process.stdin.write("\n")
            process.stdin.flush()
            yield process.stdout
        finally:
            process.kill()
            process.wait(_TIMEOUT_S)


def _cable(switch: Switch, machine: int) -> str:
    return f"{switch.name}m{machine}"


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT_S)
