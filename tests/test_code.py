"""support/code.py: which code makes a run."""

import ast
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import refused

from support import code

ROOT = Path(__file__).parent.parent


def git(folder, *words) -> str:
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", *name, *words], cwd=folder, check=True, capture_output=True,
                          text=True).stdout.strip()


@pytest.fixture
def copy(tmp_path):
    """A copy of what the hash is of."""
    for name in ("model.py", "train.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "support", tmp_path / "support")
    return tmp_path


def hash_of(folder) -> str:
    return code.code_in.__wrapped__(folder)["hash"]


@pytest.mark.parametrize("file, old, new, same", [
    ("model.py", "import math\n", "import  math  # of Python\n\n\n", True),
    ("model.py", '"""Keys and values', '"""Or: keys and values', True),
    ("support/log.py", "import json\n", "import json\nimport glob\n", True),
    ("model.py", "dropout: float = 0.0", "dropout: float = 0", False),
    ("train.py", "scaler.update()", "pass", False),
    ("support/new.py", "", "x = None\n", False)])
def test_the_hash_is_that_of_what_computes(copy, file, old, new, same):
    """Not of comments, docstrings, blanks, and what only reports."""
    text, before = (copy / file).read_text() if old else "", code.code_in()["hash"]
    assert old in text and hash_of(copy) == before
    (copy / file).write_text(text.replace(old, new))
    assert (hash_of(copy) == before) == same


def test_the_hash_is_the_same_in_python_3_15(copy, monkeypatch):
    """Whose imports have a field more."""
    before = hash_of(copy)
    for kind in (ast.Import, ast.ImportFrom):
        monkeypatch.setattr(kind, "_fields", (*kind._fields, "is_lazy"))
        monkeypatch.setattr(kind, "is_lazy", 0, raising=False)
    assert hash_of(copy) == before


def test_the_commit(copy):
    assert code.commit(copy) == "unknown"
    for words in (["init"], ["add", "."], ["commit", "-m", "x"]):
        git(copy, *words)
    head = git(copy, "rev-parse", "--short", "HEAD")
    (copy / "results.json").write_text("{}")
    assert code.commit(copy) == head
    (copy / "support" / "new.py").write_text("")
    assert code.commit(copy) == f"{head}, modified"


def test_a_copy_is_whole_and_knows_its_commit(tmp_path, monkeypatch):
    """It replaces another one, runs where git does not know it, and is not of edited files."""
    with monkeypatch.context() as patch:
        patch.setattr(code, "code_in", lambda folder=None: {"hash": folder})
        refused(lambda: code.copy_code(str(tmp_path)), "edited just now; give the command again")
    assert not (tmp_path / "commit.txt").exists()
    (tmp_path / "old.py").write_text("")
    code.copy_code(str(tmp_path))
    assert not (tmp_path / "old.py").exists()
    assert code.code_in.__wrapped__(tmp_path) == code.code_in()
    for name in ("bench.py", "config/studies/suite.py", "tools/compare.py"):
        assert (tmp_path / name).read_text() == (ROOT / name).read_text()
