"""support/errors.py: errors in lines that are safe to print, and how a program ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.errors import UserError, fail, printable, reason

ROOT = Path(__file__).parent.parent
START = "import sys; from support.errors import UserError, cli, fail\ndef main(argv): "


def test_what_is_printed_steers_no_terminal():
    assert printable("é 字") == "é 字" and printable(10**5000) == "an enormous number"
    with pytest.raises(UserError) as error:
        fail("no a\n\x1b[2J", "no b")
    assert str(error.value) == r"no a\n\x1b[2J" + "\nno b"


@pytest.mark.parametrize("error, line", [
    (ValueError(), "ValueError"), (KeyError("x"), "KeyError: 'x'"),
    (OSError(" \n\n  disk   full\nmore"), "OSError: disk full")])
def test_a_reason_is_the_first_line_that_says_something(error, line):
    assert reason(error) == line
    assert len(reason(OSError("long " * 100))) <= 160


@pytest.mark.parametrize("body, code, stderr", [
    ("fail('no a', 'no b')", 2, "error: no a\nerror: no b\n"),
    ("raise UserError('x')", 2, "error: x\n"),
    ("raise KeyboardInterrupt", 130, "interrupted\n"),
    ("print('\\u2603', *argv)", 0, "")])  # not in ASCII
def test_how_a_program_ends(body, code, stderr):
    done = subprocess.run([sys.executable, "-c", f"{START}{body}\ncli(main)", "a", "b"], cwd=ROOT,
                          capture_output=True, text=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (code, stderr)
    assert done.stdout == ("? a b\n" if code == 0 else "")


def test_a_reader_of_the_output_that_leaves():
    body = "[print('x' * 1000) for _ in range(1000)]"
    with subprocess.Popen([sys.executable, "-c", f"{START}{body}\ncli(main)"], cwd=ROOT,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (1, b"")
