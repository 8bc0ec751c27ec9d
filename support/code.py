"""Which code makes a run: a hash of what computes, the git commit, and a copy to run from."""

import ast
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from support.errors import fail

HERE = Path(__file__).resolve().parent.parent
# the files of support/ that compute nothing: what they do changes no figure
ASIDE = {"__init__", "checkpoint", "code", "errors", "files", "foreign", "log", "meta", "resume",
         "terminal", "text", "tokenizer"}


def tree(node: Any) -> Any:
    """A syntax tree as lists: without docstrings, what is empty, and whether imports are lazy, so
    that it is the same in all versions of Python, which ast.dump's words are not."""
    if isinstance(node, list):
        return [tree(child) for child in node if not isinstance(child, ast.Expr)
                or not isinstance(child.value, ast.Constant)]
    if not isinstance(node, ast.AST):
        return repr(node)
    return [type(node).__name__, *([name, tree(child)] for name, child in ast.iter_fields(node)
                                   if child not in (None, []) and name != "is_lazy")]


@functools.cache
def code_in(folder: Path = HERE) -> dict[str, str]:
    """The code in this folder: the hash of model.py, train.py and what computes in support/, and
    the git commit where there is one, with "modified" if these files are not as they are there."""
    paths = [folder / "model.py", folder / "train.py",
             *(p for p in sorted(folder.glob("support/*.py")) if p.stem not in ASIDE)]
    trees = [[path.name, tree(ast.parse(path.read_bytes()))] for path in paths]
    return {"hash": hashlib.sha256(repr(trees).encode()).hexdigest()[:16],
            "commit": commit(folder)}


def commit(folder: Path) -> str:
    """The commit of a working tree, or of the one that copy_code copied."""
    if (folder / "commit.txt").exists():
        return (folder / "commit.txt").read_text()
    try:
        head, changed = (
            subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True).stdout
            for words in (["rev-parse", "--short", "HEAD"],
                          ["status", "--porcelain", "model.py", "train.py", "support"]))
    except OSError:  # there is no git
        return "unknown"
    return f"{head.strip() or 'unknown'}{', modified' if changed else ''}"


def copy_code(folder: str) -> None:
    """Make this folder a copy of all our programs, as they are now."""
    if os.path.realpath(folder) == str(HERE):  # we run from it
        return
    shutil.rmtree(folder, ignore_errors=True)
    for pattern in ("*.py", "*/*.py", "config/*/*.py"):
        for path in HERE.glob(pattern):
            target = Path(folder, path.relative_to(HERE))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    if code_in(Path(folder))["hash"] != code_in()["hash"]:  # which was read a while ago
        fail("model.py, train.py or support/ was edited just now; give the command again")
    Path(folder, "commit.txt").write_text(code_in()["commit"])
