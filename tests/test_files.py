"""support/files.py: locks on folders, and files that are whole or absent."""

import errno
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.errors import UserError
from support.files import locked, sha256, write_json

ROOT = Path(__file__).parent.parent
HOLD = "import sys; from support.files import locked\nwith locked(sys.argv[1], 'held'): pass"


def test_a_lock_keeps_another_process_out(tmp_path):
    pytest.importorskip("fcntl")
    hold = [sys.executable, "-c", HOLD, str(tmp_path)]
    with locked(tmp_path, "held by the test"):
        with pytest.raises(UserError, match="in use"), locked(tmp_path, "in use"):
            pass
        refused = subprocess.run(hold, cwd=ROOT, capture_output=True, text=True)
    assert "UserError: held" in refused.stderr
    assert subprocess.run(hold, cwd=ROOT).returncode == 0  # the lock went with its holder


def test_without_locks_no_open_file_is_in_the_way(tmp_path, monkeypatch):
    """Windows, which has none, would not remove a folder with an open file."""
    monkeypatch.setattr("support.files.fcntl", None)
    with locked(tmp_path, "never"):
        assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_only_warned_of(tmp_path, monkeypatch, capsys):
    pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("support.files.fcntl.flock", flock)
    with locked(tmp_path, "never"):
        pass
    warning = capsys.readouterr().err
    assert str(tmp_path) in warning and "Function not implemented" in warning


def test_a_json_file_is_all_of_it_or_the_old_one(tmp_path):
    path, content = tmp_path / "meta.json", {"alphabet": "é\n", "train": {"tokens": 3}}
    write_json(path, content)
    assert json.loads(path.read_text(encoding="utf-8")) == content
    with pytest.raises(TypeError):
        write_json(path, {"first": "x" * 10**5, "second": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == content
    write_json(path, {})
    assert [p.name for p in tmp_path.iterdir()] == ["meta.json"]


def test_sha256(tmp_path):
    data = bytes(range(256)) * 5000  # more than a block
    (tmp_path / "x").write_bytes(data)
    assert sha256(tmp_path / "x") == hashlib.sha256(data).hexdigest()
