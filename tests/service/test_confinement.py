from pathlib import Path

import pytest

from service.confinement import data_problems, path_problems
from service.jobs import JobSpec


def spec(data: str) -> JobSpec:
    return JobSpec(name="digits", max_steps=1, data=data)


@pytest.fixture
def roots(tmp_path: Path) -> list[Path]:
    """Two folders that may be read; beside them are a forbidden one and ways to it."""
    allowed = [tmp_path / "allowed", tmp_path / "also"]
    for folder in (*allowed, tmp_path / "secret", tmp_path / "allowed-not"):
        folder.mkdir()
    (allowed[0] / "mnist").mkdir()
    (allowed[0] / "out").symlink_to(tmp_path / "secret")
    (tmp_path / "in").symlink_to(allowed[0] / "mnist")
    (allowed[0] / "loop").symlink_to(allowed[0] / "loop")
    return allowed


@pytest.mark.parametrize("path", ["allowed", "allowed/mnist", "also/not/there/yet", "secret/../allowed/mnist", "in"])
def test_what_lies_below_a_root_may_be_read(roots: list[Path], path: str) -> None:
    assert path_problems(f"{roots[0].parent}/{path}", roots, "/data", "KNOB") == []


@pytest.mark.parametrize(
    "path", ["secret", "allowed/../secret", "allowed/out", "allowed/out/below", "allowed-not", "", "../etc/passwd"]
)
def test_nothing_else_may_be_read_whatever_links_and_dots_say(roots: list[Path], path: str) -> None:
    (problem,) = path_problems(f"{roots[0].parent}/{path}", roots, "/data", "KNOB")
    assert (problem.pointer, problem.code) == ("/data", "path_not_allowed")
    assert str(roots[1]) in problem.message
    assert "KNOB" in problem.message


@pytest.mark.parametrize("path", ["allowed/loop", "allowed/nul\0", "allowed/" + "x" * 300])
def test_a_path_that_cannot_be_followed_is_a_problem_and_no_defect(roots: list[Path], path: str) -> None:
    problems = path_problems(f"{roots[0].parent}/{path}", roots, "/data", "KNOB")
    assert all(problem.code == "path_invalid" for problem in problems)
    assert len(problems) == (0 if "xxx" in path else 1)


def test_no_roots_allow_nothing_and_none_allows_all(tmp_path: Path) -> None:
    assert path_problems(str(tmp_path), None, "/data", "KNOB") == []
    (problem,) = path_problems(str(tmp_path), [], "/data", "KNOB")
    assert "no folder at all" in problem.message


def test_data_of_a_spec_must_be_allowed_and_then_be_there(roots: list[Path]) -> None:
    def codes(path: str, *, must_exist: bool = True) -> list[str]:
        found = data_problems(spec(f"idx:{roots[0].parent}/{path}"), roots, must_exist=must_exist)
        assert {problem.pointer for problem in found} <= {"/data"}
        return [problem.code for problem in found]

    assert codes("allowed/mnist") == []
    assert codes("allowed/nothing") == ["path_missing"]
    assert codes("allowed/nothing", must_exist=False) == []
    assert codes("secret") == codes("not-there") == ["path_not_allowed"]
    assert data_problems(spec("builtin:digits"), [], must_exist=True) == []
