"""README.md and docs/ tell the truth: commands, defaults, messages.

They refer to code by names, never by lines, and list nothing to which a fork adds.
"""

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
from unittest.mock import Mock

import numpy as np
import pytest
import tiktoken
import torch
from conftest import TINY, option_words, write_data

import bench
import model
import prepare
import sample
import train
from config import coerce, option_types, read_config
from support.device import can_compile
from support.errors import UserError
from support.files import locked

ROOT = Path(__file__).resolve().parents[1]
README, *DOCS = ((path, path.read_text(encoding="utf-8")) for path in (
    ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
TEXTS = [README, *DOCS]
TROUBLE = dict(TEXTS)[ROOT / "docs" / "troubleshooting.md"]
CONFIGS = {"train.py": train.TrainConfig, "sample.py": sample.SampleConfig,
           "prepare.py": prepare.PrepareConfig}
PROGRAMS = {"train": train, "sample": sample, "prepare": prepare, "bench": bench}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_ruff():
    pytest.importorskip("ruff")
    done = subprocess.run([sys.executable, "-m", "ruff", "check", ROOT], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_links_and_presets_exist():
    for path, text in TEXTS:
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#:]+)\)", prose):
            assert (path.parent / target).exists(), (path.name, target)
        for preset in re.findall(r"`(config/[\w/]+\.py)`", text):
            assert (ROOT / preset).exists(), preset


# -----------------------------------------------------------------------------
# Examples


def test_what_a_fork_adds_as_the_readme_says(monkeypatch, run, tmp_path, capsys):
    """Each of its classes, pasted into model.py, and a preset of its own: the run trains, resumes,
    and is sampled."""
    tables = {"template": "TEMPLATES", "ffn": "FFNS", "attention": "ATTENTIONS"}
    for table in tables.values():
        monkeypatch.setattr(model, table, dict(getattr(model, table)))
    added = {}
    for code in blocks(README[1], "python"):
        before = {option: set(getattr(model, table)) for option, table in tables.items()}
        exec(code, vars(model).copy())
        assert len(code.split("\n\n")[-1].splitlines()) == 1  # the line in the table
        for option, table in tables.items():
            for name in set(getattr(model, table)) - before[option]:
                added[option] = name
    assert added.keys() >= {"template", "ffn"}
    (tmp_path / "mine.py").write_text("".join(f"{k} = {v!r}\n" for k, v in added.items()))
    out = tmp_path / "out"
    run(out, str(tmp_path / "mine.py"), max_iters=3)
    run(out, init_from="resume", max_iters=6)
    assert "done: 6 steps" in capsys.readouterr().out
    sample.main([f"--out_dir={out}", "--device=cpu", "--num_samples=1", "--max_new_tokens=20"])
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
    assert added.items() <= checkpoint["model_args"].items()
    trained = model.GPT(model.GPTConfig(**checkpoint["model_args"]))
    learned, starts = checkpoint["model"], trained.state_dict()
    for name in trained.parameter_roles()["scalar"]:
        assert not torch.equal(learned[name], starts[name]), f"{name} was not learned"


# -----------------------------------------------------------------------------
# Commands and options


def test_commands_parse(monkeypatch):
    """The lines of sh blocks, and what stands between backticks and begins like a command; but not
    in the first column of a table, which is nanoGPT's."""
    monkeypatch.chdir(ROOT)
    seen = 0
    for _, text in TEXTS:
        text = re.sub(r"^\| [^|]*\|(?=.*\|$)", "|", text, flags=re.MULTILINE)
        inline = re.findall(r"`((?:[A-Z_]+=\S+ )?(?:python|torchrun) [^`]+)`", text)
        for command in "\n".join(blocks(text, "sh")).splitlines() + inline:
            words = [word for word in shlex.split(command, comments=True) if word != "..."]
            if "-c" in words:
                compile(words[words.index("-c") + 1], command, "exec")
            name = next((word for word in words if word.removesuffix(".py") in PROGRAMS), None)
            unclear = ("--help", "path/to", "[", "(the same", "COMMAND")
            if name is None or any(word in command for word in unclear):
                continue
            options = words[words.index(name) + 1:]
            if name == "bench.py":
                bench.read_options(options)
            else:
                read_config(CONFIGS[name], options,
                            positional="corpus" if name == "prepare.py" else None)
            seen += 1
    assert seen >= 50


def test_option_tables():
    """The names exist, the defaults are as stated."""
    seen = 0
    for block in TROUBLE.split("\n\n"):
        if not (program := re.match(r"\| `(\w+\.py)`[^|]*\| default \| meaning \|", block)):
            continue
        cls = CONFIGS[program[1]]
        kinds, defaults = option_types(cls), {f.name: f.default for f in fields(cls)}
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


def test_messages_are_what_the_programs_print(place, monkeypatch, capsys):
    """Every message that troubleshooting.md quotes is printed by one of these commands."""
    tiny = option_words(**TINY | dict(dataset="mine"))
    train.main([*tiny, "--max_iters=2"])
    letters = {"tokenizer": "char", "alphabet": "abcdefghijklmnopqrstuvwxyz", "vocab_size": 26}
    torch.save(torch.load("out/ckpt.pt", weights_only=True) | {"tokenizer": letters}, "letters.pt")
    Path("yurii.pt").touch()
    Path("src").mkdir()
    Path("src/package.json").write_text('{"name": "x", "version": 1}')
    Path("x.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    offline = Mock(side_effect=urllib.error.URLError("no network"))
    new = "train --out_dir=new"

    def four_ranks(config, ranks=train.Ranks):
        started = ranks(config)
        started.world = 4
        return started

    cases = [  # a command, and what is replaced while it runs
        ("train --learning_rte=1",),
        ("train --max_iters=many",),
        ("train config/shakespere_char.py",),
        ("train --n_embd=384 --n_head=5",),
        ("train --min_lr=0.1",),
        ("train --eval_iters=2 --eval_tokens=9",),
        ("train",),
        (f"{new} --compile=True", torch, "compile", Mock(side_effect=RuntimeError("no compiler"))),
        ("sample --init_from=gpt2", sys.modules, "transformers", None),
        (f"{new} --wandb_log", sys.modules, "wandb", None),
        (f"{new} --dataset=shakespeare_char",),
        (f"{new} --dataset=short --block_size=1024",),
        ("prepare shakespeare_char", urllib.request, "urlopen", offline),
        ("prepare shakespeare", tiktoken, "get_encoding", offline),
        ("prepare text --tokenizer=bytes --input src",),
        ("prepare text --tokenizer=bytes --input x.jsonl.zst",),
        ("sample --init_from=letters.pt --start=caf\xe9",),
        (f"{new} --vocab_size=100",),
        ("train --init_from=resume --dataset=letters",),
        ("train --init_from=resume --out_dir=out-b",),
        ("train --init_from=resume --n_layer=4",),
        ("train --init_from=resume --dataset=other",),
        ("sample --out_dir=nowhere",),
        (f"{new} --learning_rate=1e38 --warmup_iters=0 --eval_interval=1",),
        (new, train, "train", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory."))),
        (f"{new} --gradient_accumulation_steps=6", train, "Ranks", four_ranks),
        ("sample --start=",),
        ("bench convert --ckpt=out --template=tmm --velocity_norm=none --out=yurii.pt",),
        ("bench eval --ckpt=out --tasks=hellaswag", sys.modules, "lm_eval", None),
        ("bench plot out --draw=scalars",),
        ("sample", sample, "draw_samples",
         Mock(side_effect=torch.OutOfMemoryError("out of memory"))),
    ]
    quoted = {m: re.escape(m).replace(r"\.\.\.", ".+")
              for m in re.findall(r"`((?:error: |not compiled)[^`]*)`", TROUBLE)}
    printed = set()

    def check(*lines: str) -> None:
        fits = {m for m, pattern in quoted.items() if re.fullmatch(pattern, "\n".join(lines))}
        assert fits, f"docs/troubleshooting.md does not quote: {lines}"
        printed.update(fits)

    def run(command: str) -> None:
        name, *words = command.split()
        words = {"train": tiny, "sample": ["--device=cpu"]}.get(name, []) + words
        with pytest.raises(UserError) as error:
            PROGRAMS[name].main(words)
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
    run(new)
    if not torch.cuda.is_available():
        run("train --device=cuda")
        capsys.readouterr()
        assert not can_compile(None, torch.device("cuda"))
        check(capsys.readouterr().err.strip())
    elsewhere = {m for m in quoted if "no cuda here" in m or m.startswith("not compiled")
                 or (sys.platform == "win32" and "another run" in m)}
    assert quoted.keys() - printed <= elsewhere


# -----------------------------------------------------------------------------
# Coming from nanoGPT


NANOGPT_CONFIG = """
import time
out_dir = 'out-mini'
eval_interval = 2 # keep frequent
eval_iters = 3
wandb_run_name = 'mini-' + str(time.time())
gradient_accumulation_steps = 1 * 2
learning_rate = 1e-3
min_lr = learning_rate / 10
dataset, bias, compile = 'letters', True, False
"""


def test_nanogpts_config_and_data(place, capsys):
    """The config trains on a folder with its meta.pkl, and the run is sampled."""
    letters = dict(enumerate("abcdefghijklmnopqrstuvwxyz"))
    (place / "data/letters/meta.json").unlink()
    (place / "data/letters/meta.pkl").write_bytes(pickle.dumps({
        "vocab_size": 26, "itos": letters, "stoi": {c: i for i, c in letters.items()}}))
    Path("train_mini.py").write_text(NANOGPT_CONFIG)
    train.main([*option_words(**TINY), "train_mini.py", "--batch_size=8"])
    output = capsys.readouterr().out
    assert "eval_iters = 3 means eval_tokens = 384" in output and "26 ids" in output
    assert "done: 6 steps" in output
    sample.main(["--out_dir=out-mini", "--device=cpu", "--num_samples=2", "--max_new_tokens=30",
                 "--start=x"])
    text = capsys.readouterr().out
    assert text.count("x") >= 2 and set(text) - set("-\n") <= set(letters.values())
