from pathlib import Path

import pytest

from service.webhooks import SecretFiles, SecretUnreadable


def test_a_secret_is_read_anew_each_time_less_the_end_of_its_line(tmp_path: Path) -> None:
    file = tmp_path / "ci@alice"
    file.touch(0o600)
    for text in ("first-secret-of-16", "another-secret-then"):
        file.write_text(text + "\n")
        secret = SecretFiles(tmp_path).read("ci@alice")
        assert secret.get_secret_value() == text
        assert text not in f"{secret!r} {secret}"


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o606, 0o602])
def test_a_secret_that_is_not_kept_as_one_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "name"
    file.write_text("long-enough-for-a-secret")
    file.chmod(mode)
    with pytest.raises(SecretUnreadable, match="open to everyone"):
        SecretFiles(tmp_path).read("name")
    file.chmod(0o440)
    assert SecretFiles(tmp_path).read("name").get_secret_value() == file.read_text()


def test_what_is_no_secret_is_refused_without_telling_what_it_is(tmp_path: Path) -> None:
    contents = {"short": b"fifteen-letters", "empty": b"", "binary": b"\xff" * 32, "long": b"x" * 4097}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).chmod(0o600)
    (tmp_path / "folder").mkdir(0o700)
    for name in (*contents, "folder", "missing"):
        with pytest.raises(SecretUnreadable, match="SYNCBN_SECRETS_DIR") as refusal:
            SecretFiles(tmp_path).read(name)
        assert "fifteen" not in str(refusal.value)
    with pytest.raises(SecretUnreadable, match="has no secrets"):
        SecretFiles(None).read("short")
