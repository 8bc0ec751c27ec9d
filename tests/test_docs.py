"""The documents in docs/ tell the truth: quoted lines, printed results, options and messages.

A link to a line of code, such as [model.py:361](../model.py#L361), stands before a block that
quotes that line and those after it. When the code has moved, `python tests/test_docs.py` rewrites
the numbers of these links from the quoted lines.
"""

import contextlib
import io
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest

if __name__ != "__main__":  # as a program it needs none of these
    import tiktoken
    import torch
    from conftest import TINY, option_words, write_data
    from test_train import nanogpt_checkpoint

    import bench
    import prepare
    import sample
    import train
    from bench import BenchConfig
    from config import coerce, read_config
    from support.device import can_compile
    from support.errors import UserError
    from support.files import locked

    CONFIGS = {"train.py": train.TrainConfig, "sample.py": sample.SampleConfig,
               "prepare.py": prepare.PrepareConfig, "bench.py": BenchConfig}

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
QUOTE = re.compile(r"\[(\w+\.py):(\d+)\]\(\.\./\1#L(\d+)\)\n\n```py\n(.*?)```", re.DOTALL)
RUN = re.compile(r"```python\n(.*?)```(?:\n\n(?:[^\n]+\n\n)?```text\n(.*?)```)?", re.DOTALL)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


# -----------------------------------------------------------------------------
# Quoted lines


def lines_that_match(file: str, quoted: str) -> list[int]:
    """Where (counted from 1) the file has these lines, but for white space around them."""
    code, wanted = ([line.strip() for line in text.splitlines()]
                    for text in (read(ROOT / file), quoted))
    return [i + 1 for i in range(len(code)) if code[i:i + len(wanted)] == wanted]


def right_number(file: str, number: str, quoted: str) -> int:
    """The line that a link must name: the nearest that matches. ValueError if there is none."""
    if not (found := lines_that_match(file, quoted)):
        raise ValueError(f"{file} does not have, in this order:\n{quoted}")
    return min(found, key=lambda line: abs(line - int(number)))


def rewrite(text: str) -> str:
    """The text with the right numbers in its links."""
    def mend(match: re.Match) -> str:
        file, number, _, quoted = match.groups()
        link = f"[{file}:{number}](../{file}#L{match[3]})"
        right = right_number(file, number, quoted)
        return match[0].replace(link, f"[{file}:{right}](../{file}#L{right})")

    return QUOTE.sub(mend, text)


def test_quoted_lines_are_where_the_links_say():
    for document in DOCS:
        text = read(document)
        links = len(re.findall(r"\]\(\.\./\w+\.py#L", text))
        assert links == len(QUOTE.findall(text)), f"{document.name}: a link quotes nothing"
        for file, number, number_again, quoted in QUOTE.findall(text):
            right = right_number(file, number, quoted)
            assert number == number_again == str(right), (
                f"{document.name}: {file}:{number} is line {right} now; "
                f"python tests/test_docs.py rewrites the numbers")


def test_numbers_are_rewritten():
    text = read(ROOT / "docs" / "lesson.md")
    assert len(QUOTE.findall(text)) > 10 and rewrite(text) == text
    assert rewrite(re.sub(r"(:|#L)(\d+)(?=[\])])", r"\g<1>1", text)) == text
    with pytest.raises(ValueError, match="does not have"):
        right_number("model.py", "1", "no such line")


def test_links_lead_somewhere():
    for document in (*DOCS, ROOT / "README.md"):
        prose = re.sub(r"```.*?```", "", read(document), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#:]+)(?:#L\d+)?\)", prose):
            assert (document.parent / target).exists(), (document.name, target)


# -----------------------------------------------------------------------------
# Examples: what a python block prints is the text block below it


def test_the_examples_print_what_they_say():
    """Those of the lesson build on each other, the answers to the exercises stand alone."""
    lesson, exercises = read(ROOT / "docs" / "lesson.md").split("## Exercises")
    shared: dict = {}
    answers = re.split(r"\n\*\*\d+\. ", exercises)[1:]
    assert 6 <= len(answers) <= 8 and all(RUN.search(answer) for answer in answers)
    for part, names in ((lesson, lambda: shared), (exercises, dict)):
        assert part.count("```python") == len(RUN.findall(part))
        for code, said in RUN.findall(part):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(code, "docs/lesson.md", "exec"), names())
            assert printed.getvalue() == said, code
            assert said or "assert" in code, f"this shows nothing:\n{code}"


# -----------------------------------------------------------------------------
# Commands and options


def commands(text: str) -> list[str]:
    """The lines of sh blocks, and what stands between backticks and begins like a command; but not
    in the first column of a table, which is nanoGPT's."""
    text = re.sub(r"^\| [^|]*\|(?=.*\|$)", "|", text, flags=re.MULTILINE)
    inline = re.findall(r"`((?:[A-Z_]+=\S+ )?(?:python|torchrun) [^`]+)`", text)
    return "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).splitlines() + inline


def test_commands_parse(monkeypatch):
    monkeypatch.chdir(ROOT)
    seen = 0
    for command in (c for document in DOCS for c in commands(read(document))):
        words = [word for word in shlex.split(command, comments=True) if word != "..."]
        if "-c" in words:
            compile(words[words.index("-c") + 1], command, "exec")
        if not (name := next((word for word in words if word in CONFIGS), None)):
            continue
        options = words[words.index(name) + 1:]
        if options[:1] == ["plot"]:  # and then the folders of runs
            options = ["plot", *(word for word in options if word.startswith("--"))]
        if "--help" not in options and not any("path/to" in word for word in options):
            positional = {"prepare.py": "corpus", "bench.py": "command"}.get(name)
            read_config(CONFIGS[name], options, positional=positional)
        seen += 1
    assert seen >= 18


def test_option_tables():
    """The names exist, the defaults are as stated."""
    seen = 0
    for block in read(ROOT / "docs" / "troubleshooting.md").split("\n\n"):
        if not (program := re.match(r"\| `(\w+\.py)`[^|]*\| default \| meaning \|", block)):
            continue
        cls = CONFIGS[program[1]]
        kinds, defaults = get_type_hints(cls), {f.name: f.default for f in fields(cls)}
        for name, stated in re.findall(r"^\| `(\w+)` \| ([^|]*) \|", block, re.MULTILINE):
            stated = {"()": (), '"\\n"': "\n"}.get(stated, stated)
            default = defaults[name]
            assert (stated == "auto" if default is None else
                    coerce(name, stated, kinds[name]) == default), name
            seen += 1
    assert seen > 30


# -----------------------------------------------------------------------------
# Troubleshooting: the messages are what the programs print


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in: data/mine, other, short, letters; config; and in out a finished run."""
    rng = np.random.default_rng(0)
    for name, n in (("mine", 2000), ("other", 500), ("short", 2000)):
        write_data(tmp_path / "data" / name, rng.integers(256, size=n), rng.integers(256, size=300))
    write_data(tmp_path / "data" / "letters", rng.integers(26, size=500), vocab_size=26,
               tokenizer="char", alphabet="abcdefghijklmnopqrstuvwxyz")
    shutil.copytree(ROOT / "config", tmp_path / "config")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def raising(error: BaseException):
    def function(*_, **__):
        raise error

    return function


def test_messages_are_what_the_programs_print(place, monkeypatch, capsys):
    """Every message that troubleshooting.md quotes is printed by one of these commands."""
    tiny = option_words(**TINY | dict(dataset="mine", warmup_iters=0))
    train.main([*tiny, "--max_iters=2"])
    letters = {"tokenizer": "char", "alphabet": "abcdefghijklmnopqrstuvwxyz", "vocab_size": 26}
    torch.save(torch.load("out/ckpt.pt", weights_only=True) | {"tokenizer": letters}, "letters.pt")
    Path("yurii.pt").touch()
    offline = raising(urllib.error.URLError("no network"))
    new = "train --out_dir=new"
    cases = [  # a command, and what is replaced while it runs
        ("train --learning_rte=1",),
        ("train --max_iters=many",),
        ("train config/shakespere_char.py",),
        ("train --n_embd=384 --n_head=5",),
        ("train --max_iters=100 --warmup_iters=200",),
        ("train --eval_iters=2 --eval_tokens=9",),
        ("train",),
        (f"{new} --compile=True", torch, "compile", raising(RuntimeError("no compiler"))),
        ("sample --init_from=gpt2", sys.modules, "transformers", None),
        (f"{new} --wandb_log", sys.modules, "wandb", None),
        ("train --dataset=shakespeare_char",),
        (f"{new} --dataset=short --block_size=1024",),
        ("prepare shakespeare_char", urllib.request, "urlopen", offline),
        ("prepare shakespeare", tiktoken, "get_encoding", offline),
        ("sample --init_from=letters.pt --start=caf\xe9",),
        (f"{new} --vocab_size=100",),
        ("train --init_from=resume --dataset=letters",),
        ("train --init_from=resume --out_dir=out-b",),
        ("train --init_from=resume --n_layer=4",),
        ("train --init_from=resume --dataset=other",),
        ("sample --out_dir=nowhere",),
        (f"{new} --learning_rate=1e38 --max_iters=5 --eval_interval=1",),
        (new, train, "train", raising(torch.OutOfMemoryError())),
        ("train --gradient_accumulation_steps=6", os.environ, "WORLD_SIZE", "4"),
        ("sample --start=",),
        ("bench convert --ckpt=out --template=tmm --velocity_norm=none --out=yurii.pt",),
        ("bench eval --ckpt=out --tasks=hellaswag", sys.modules, "lm_eval", None),
        ("bench plot out --draw=scalars",),
        ("sample", sample, "draw_samples", raising(torch.OutOfMemoryError("out of memory"))),
    ]
    text = read(ROOT / "docs" / "troubleshooting.md")
    quoted = {m: re.escape(m).replace(r"\.\.\.", ".+")
              for m in re.findall(r"`((?:error: |not compiled)[^`]*)`", text)}
    printed = set()

    def check(*lines: str) -> None:
        fits = {m for m, pattern in quoted.items() if re.fullmatch(pattern, "\n".join(lines))}
        assert fits, f"docs/troubleshooting.md does not quote: {lines}"
        printed.update(fits)

    def run(command: str) -> None:
        name, *words = command.split()
        words = {"train": tiny, "sample": ["--device=cpu"]}.get(name, []) + words
        with pytest.raises(UserError) as error:
            {"train": train, "sample": sample, "prepare": prepare, "bench": bench}[name].main(words)
        check(*(f"error: {line}" for line in str(error.value).splitlines()))

    for command, *replaced in cases:
        with monkeypatch.context() as m:
            if replaced:
                where, name, value = replaced
                (m.setattr if hasattr(where, name) else m.setitem)(where, name, value)
            run(command)
    with locked("out", "held by the test"):
        run("train --init_from=resume" if sys.platform != "win32" else "train")
    (place / "out" / "ckpt.pt").write_bytes(b"cut off")
    run("sample --init_from=out/ckpt.pt")
    shutil.rmtree(place / "data" / "mine")
    run("train")
    if not torch.cuda.is_available():
        run("train --device=cuda")
        assert not can_compile(None, torch.device("cuda"), check)
    there = {m for m in quoted if "no cuda here" in m or m.startswith("not compiled")
             or (sys.platform == "win32" and "another run" in m)}
    assert quoted.keys() - printed <= there


# -----------------------------------------------------------------------------
# Coming from nanoGPT: its files, from the command line


NANOGPT_CONFIG = """
# train a miniature model
import time

out_dir = 'out-theirs'
eval_interval = 2 # keep frequent
eval_iters = 3
log_interval = 1
wandb_log = False # override via command line if you like
wandb_run_name = 'mini-' + str(time.time())

dataset = 'tiny'
gradient_accumulation_steps = 1 * 2
batch_size = 4
block_size = 16

n_layer = 2
n_head = 2
n_embd = 32
bias = True
dropout = 0.0

learning_rate = 1e-3
max_iters = 6
lr_decay_iters = 6 # make equal to max_iters usually
min_lr = learning_rate / 10
beta2 = 0.99
warmup_iters = 2

device = 'cpu'  # run on cpu only
compile = False # do not torch compile the model
"""


def test_nanogpts_files_from_the_command_line(tmp_path, monkeypatch, capsys):
    """Its config trains on its data; its checkpoint samples and resumes; ours samples."""
    alphabet = [chr(0x100 + i) for i in range(257)]
    folder = tmp_path / "data" / "tiny"
    folder.mkdir(parents=True)
    for split, n in (("train", 2000), ("val", 300)):
        np.random.default_rng(n).integers(257, size=n).astype(np.uint16).tofile(
            folder / f"{split}.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({
        "vocab_size": 257, "itos": dict(enumerate(alphabet)),
        "stoi": {c: i for i, c in enumerate(alphabet)}}))
    (tmp_path / "train_mini.py").write_text(NANOGPT_CONFIG)
    (tmp_path / "out").mkdir()
    nanogpt_checkpoint(tmp_path / "out" / "ckpt.pt")  # compiled: with _orig_mod. prefixes

    monkeypatch.chdir(tmp_path)

    def program(name: str, *words: str) -> str:
        done = subprocess.run([sys.executable, ROOT / name, *words], text=True, encoding="utf-8",
                              capture_output=True, env={**os.environ, "PYTHONUTF8": "1"})
        assert done.returncode == 0, done.stderr
        return done.stdout

    words = ["--device=cpu", "--num_samples=2", "--max_new_tokens=30", f"--start={alphabet[5]}"]
    text = program("sample.py", *words)
    assert text.count(alphabet[5]) >= 2 and set(text) - set("-\n") <= set(alphabet)
    said = program("train.py", "train_mini.py", "--init_from=resume", "--out_dir=out")
    assert "resuming out at step 4" in said and "done: 6 steps" in said
    train.main(["train_mini.py", "--batch_size=8"])  # from scratch; in this process, as is quicker
    said = capsys.readouterr().out
    assert "eval_iters = 3 means eval_tokens = 384" in said and "257 ids" in said
    assert "done: 6 steps" in said
    sample.main(["--out_dir=out-theirs", *words])
    text = capsys.readouterr().out
    assert text.count(alphabet[5]) >= 2 and set(text) - set("-\n") <= set(alphabet)


if __name__ == "__main__":
    for document in DOCS:
        if (new := rewrite(read(document))) != read(document):
            document.write_text(new, encoding="utf-8")
            print(f"rewrote {document.name}")
    sys.exit()
