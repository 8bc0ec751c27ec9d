"""support/files.py: locks on folders, and files that are whole or absent."""

import errno
import hashlib
import json

import pytest

from support.errors import UserError
from support.files import locked, sha256, write_json


def test_a_folder_has_one_holder(tmp_path):
    pytest.importorskip("fcntl")
    for _ in range(2):  # the second time the first has let go
        with locked(tmp_path, "never"), pytest.raises(UserError, match="in use"):
            with locked(tmp_path, "in use"):
                pass


def test_a_file_system_without_locks_is_only_warned_of(tmp_path, monkeypatch, capsys):
    pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("support.files.fcntl.flock", flock)
    with locked(tmp_path, "never"):
        pass
    warning = capsys.readouterr().err
    assert str(tmp_path) in warning and "Function not implemented" in warning


def test_a_json_file_is_the_new_or_the_old(tmp_path):
    path, content = tmp_path / "meta.json", {"alphabet": "é\n" * 5000, "name": "caf\udce9"}
    write_json(path, content)
    with pytest.raises(TypeError):
        write_json(path, {"text": "x" * 10**5, "no json": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == content
    assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
