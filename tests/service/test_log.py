"""The log as a person or a collector reads it, from a process that writes one."""

import json
import subprocess
import sys

_PROGRAM = """
import logging, sys
import structlog
from service.log import configure_log
configure_log(as_json=sys.argv[1] == "json")
structlog.contextvars.bind_contextvars(request="abc")
structlog.get_logger("scheduler").info("job is now", job="job_1", attempt=2)
logging.getLogger("uvicorn.error").warning("a library's %s", "word")
logging.getLogger("httpx2").info("not for us")
def fail(token):
    1 / 0
try:
    fail("what nobody shall read")
except ZeroDivisionError:
    structlog.get_logger("api").exception("a request failed")
"""


def _lines(kind: str) -> list[str]:
    answer = subprocess.run(
        [sys.executable, "-c", _PROGRAM, kind], capture_output=True, text=True, timeout=60, check=True
    )
    assert answer.stdout == ""
    return answer.stderr.splitlines()


def test_every_json_line_is_one_object_with_the_ids_of_what_it_is_about() -> None:
    ours, theirs, failed = map(json.loads, _lines("json"))
    assert ours.pop("timestamp").endswith("Z")
    assert ours == {
        "event": "job is now",
        "job": "job_1",
        "attempt": 2,
        "request": "abc",
        "level": "info",
        "logger": "scheduler",
    }
    assert (theirs["event"], theirs["level"], theirs["request"]) == ("a library's word", "warning", "abc")
    assert failed["exception"][0]["exc_type"] == "ZeroDivisionError"


def test_a_traceback_tells_where_but_not_what_was_in_the_variables() -> None:
    for kind in ("json", "text"):
        text = "\n".join(_lines(kind))
        assert "fail" in text
        assert "nobody" not in text


def test_text_for_people_names_the_same() -> None:
    text = "\n".join(_lines("text"))
    for part in ("job is now", "job=job_1", "attempt=2", "request=abc", "a library's word", "ZeroDivisionError"):
        assert part in text
    assert "not for us" not in text
