"""Secrets by name: one file each, in a folder that the operator fills, read anew whenever one is needed."""

from pathlib import Path

from pydantic import SecretStr

KNOB = "SYNCBN_SECRETS_DIR"

MIN_LENGTH = 16
"""Bytes; fewer could be guessed from one signed message."""

_MAX_LENGTH = 4096
_OTHERS = 0o006
"""Permission of everyone to read or to write."""


class SecretUnreadable(Exception):
    """There is no such secret, or it is not kept as a secret must be."""


class SecretFiles:
    """The secrets in ``folder``; None: there are none."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def read(self, name: str) -> SecretStr:
        """The secret, less the end of line behind it. ``name`` is a `service.jobs.SECRET_NAME`, so no path.

        Raises: SecretUnreadable, which says why, and tells neither what the file holds nor the name, which may be a
            secret itself that somebody gave in its place.
        """
        if self._folder is None:
            raise SecretUnreadable(f"this service has no secrets; its operator keeps them in the folder {KNOB}")
        path = self._folder / name
        try:
            if path.stat().st_mode & _OTHERS:
                raise SecretUnreadable(
                    f"its file in {KNOB} is open to everyone; the service's operator sets mode 0600 or 0440"
                )
            with path.open("rb") as file:
                content = file.read(_MAX_LENGTH + 1).rstrip(b"\r\n")
            text = content.decode()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise SecretUnreadable(f"no secret of this name can be read in {KNOB}: {why}") from None
        if not MIN_LENGTH <= len(content) <= _MAX_LENGTH:
            raise SecretUnreadable(f"its file in {KNOB} must hold {MIN_LENGTH} to {_MAX_LENGTH} bytes")
        return SecretStr(text)
