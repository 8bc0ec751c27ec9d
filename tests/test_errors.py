"""support/errors.py: errors in lines that are safe to print, and how a program ends."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.errors import UserError, cli, explain_failures, fail, reason

PROGRAM = "from support.errors import *; import sys\ndef main(argv): {}\ncli(main)"


def test_errors_in_lines():
    with pytest.raises(UserError) as error:
        fail("no é\n\x1b[2J", "no b")
    assert str(error.value).splitlines() == [r"no é\n\x1b[2J", "no b"]
    assert reason(ValueError()) == "ValueError"
    assert reason(OSError(" \n\n  disk   full\nmore")) == "OSError: disk full more"
    assert len(reason(OSError("long " * 100))) <= 160


@pytest.mark.parametrize("body, code, stdout, stderr", [
    ("fail('no a', 'no b')", 2, "", "error: no a\nerror: no b\n"),
    ("raise KeyboardInterrupt", 130, "", "interrupted\n"),
    ("print('\\u2603', *argv)", 0, "? a b\n", ""),  # not in ASCII
    ("print('x' * 10**6)", 1, None, "")])  # whose reader leaves
def test_how_a_program_ends(body, code, stdout, stderr):
    with subprocess.Popen([sys.executable, "-c", PROGRAM.format(body), "a", "b"], text=True,
                          cwd=Path(__file__).parent.parent, stdout=-1, stderr=-1,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"}) as process:
        if stdout is None:
            process.stdout.close()
        else:
            assert process.stdout.read() == stdout
        assert (process.wait(60), process.stderr.read()) == (code, stderr)


@pytest.mark.parametrize("redirected, body, code, stderr", [
    (">&-", "print('x', flush=True)", 0, ""), ("<&-", "assert sys.stdin.read() == ''", 0, ""),
    ("2>&-", "print('x\\udce9', file=sys.stderr)", 0, ""),
    ("2>/dev/full", "print('x', file=sys.stderr)", 0, ""), ("2>/dev/full", "fail('no a')", 2, ""),
    (">&- 2>&- <&-", "fail('no a')", 2, ""), (">/dev/full", "fail('no a')", 2, "error: no a\n"),
    *((">/dev/full", body, 2, "error: standard output: No space left on device; print to another "
       "place\n") for body in ("print('x')", "print('x'); sys.exit()", "print('x' * 10**6)"))])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_streams_that_are_closed_or_full(redirected, body, code, stderr, unbuffered):
    command = ["sh", "-c", f'"$0" -c "$1" {redirected}', sys.executable, PROGRAM.format(body)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, stderr=-1, text=True,
                          env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    assert (done.returncode, done.stderr) == (code, stderr)


@pytest.mark.parametrize("words, said", [
    ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "out of memory"),
    ("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes.", "out of memory"),
    ("DefaultCPUAllocator: can't allocate memory: you tried to", "out of memory"),
    ("MPS backend out of memory (MPS allocated: 9 GB)", "out of memory"),
    ("gloo: no route", "ended or does not answer.*gloo: no route"),
    (f"gloo {'or' * 99}: unhandled\nLast error:\nDuplicate GPU detected", r"\(Duplicate GPU det")])
def test_what_the_machine_does(monkeypatch, words, said):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=said), explain_failures("here", mend="mend it"):
        raise RuntimeError(words)


def test_in_a_notebook(monkeypatch):
    """Whose streams are no files; they are the same afterwards."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    cli(lambda argv: print("x"))
    assert sys.stdout.getvalue() == "x\n"
