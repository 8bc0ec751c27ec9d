"""support/errors.py: errors in lines that are safe to print, and how a program ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.errors import UserError, fail, reason

PROGRAM = "from support.errors import *; import sys\ndef main(argv): {}\ncli(main)"


def test_errors_in_lines():
    with pytest.raises(UserError) as error:
        fail("no é\n\x1b[2J", "no b")
    assert str(error.value).splitlines() == [r"no é\n\x1b[2J", "no b"]
    assert reason(ValueError()) == "ValueError"
    assert reason(OSError(" \n\n  disk   full\nmore")) == "OSError: disk full"
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
