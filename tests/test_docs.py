"""README.md, CONTRIBUTING.md and docs/ tell the truth: commands, options, links, messages, blocks
of code, and what the tables compute.

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
import torch
from conftest import TINY, option_words, write_data
from test_presets import load, model_of, tokens_per_step

import bench
import model
import prepare
import sample
import train
from config import read_config
from support.device import can_compile
from support.errors import UserError
from support.files import locked

ROOT = Path(__file__).resolve().parents[1]
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in (
    *ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md")), ROOT / "docs/results/README.md")}
README, TROUBLE, SPEED = (PAGES[name] for name in ("README.md", "docs/troubleshooting.md",
                                                   "docs/speed.md"))
CONFIGS = {"train.py": train.TrainConfig, "sample.py": sample.SampleConfig,
           "prepare.py": prepare.PrepareConfig}
PROGRAMS = {"train": train, "sample": sample, "prepare": prepare, "bench": bench}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def without_blocks(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def test_ruff():
    pytest.importorskip("ruff")
    done = subprocess.run([sys.executable, "-m", "ruff", "check", ROOT], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# -----------------------------------------------------------------------------
# Size, links, presets


def test_the_pages_stay_short():
    assert sum(len(text.split()) for text in PAGES.values()) <= 8000
    assert len(README.splitlines()) <= 220
    for name, text in PAGES.items():
        if name != "docs/results/README.md":
            assert not [line for line in without_blocks(text).splitlines()
                        if len(line) > 160 and not line.startswith("|")], name


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_and_presets_exist(name):
    text = PAGES[name]
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#]*)#?([^)]*)\)", without_blocks(text)):
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), anchor
    for preset in re.findall(r"`(config/[\w/]+\.py)`", text):
        assert (ROOT / preset).exists() or preset == "config/mine.py", preset


# -----------------------------------------------------------------------------
# The table of presets: parameters and tokens are the presets', hours and memory follow from
# docs/speed.md. A preset of your own needs no row.


def tokens(name: str) -> float:
    return load(name).max_iters * tokens_per_step(load(name))


def hours(name: str) -> float:
    """Of one H100. Its speed is its template's or its FFN's, scaled by FLOPs per token; a token of
    an evaluation is a third of one of training. TinyStories has 2.4 M tokens to evaluate on."""
    speeds = {row: float(speed.replace(",", ""))
              for row, speed in re.findall(r"^\| `(\w+)`[^|`]*\| ([\d,]+)", SPEED, re.MULTILINE)}
    c = load(name)
    alike = "gpt_owt" if c.ffn == "mlp" else f"{c.ffn}_113m"
    template = {"polyak": "nesterov"}.get(c.template, c.template)
    speed = speeds["gd" if c.ffn == "mlp" else alike] * speeds[template] / speeds["gd"]
    speed *= model_of(alike).flops_per_token() / model_of(name).flops_per_token()
    evaluated = min(c.eval_tokens, 2.4e6 if c.dataset == "tinystories" else c.eval_tokens)
    evaluations = (c.max_iters // c.eval_interval + 1) * evaluated
    return (tokens(name) + evaluations / 3) / speed / 3600


def memory(name: str, batch_size: int | None = None) -> float:
    """Bytes: the state of every parameter, the logits, what the layers keep for the backward."""
    c, gpt = load(name), model_of(name)
    kept = 50 if c.ffn == "hourglass" else 29 if (c.template, c.ffn) == ("gd", "mlp") else 41
    token = 4 * gpt.config.vocab_size + kept * c.n_layer * c.n_embd
    return 16 * gpt.get_num_params(False) + token * c.block_size * (batch_size or c.batch_size)


def rounded(value: float, like: str) -> str:
    """With the decimals of a figure on the page."""
    return f"{value:.{len(like.partition('.')[2])}f}"


def check_figures(cell: str, names: list[str], value) -> None:
    """A cell has one figure for each preset of the row, or one for all, and their unit."""
    figures, unit = re.findall(r"[\d.]+", cell), cell.split(" <")[0].split()[-1]
    scale = {"G": 1e9, "M": 1e6, "GB": 1e9, "h": 1}[unit]
    for i, name in enumerate(names):
        figure = figures[min(i, len(figures) - 1)]
        assert figure == rounded(value(name) / scale, figure), (name, value(name) / scale)


ROWS = [re.findall(r"[^|]+", line) for line in README.splitlines() if re.match(r"\| `\w+`", line)
        and line.count("|") == 7]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip())
def test_table_of_presets(row):
    names = re.findall(r"`(\w+)`", row[0])
    check_figures(row[1], names, lambda name: model_of(name).get_num_params(False))
    check_figures(row[2], names, tokens)
    if " h " in row[3]:
        check_figures(row[3], names, hours)
        check_figures(row[4], names, memory)


def test_hours_in_the_presets():
    """Their Cost lines that refer to docs/speed.md."""
    seen = 0
    for path in (ROOT / "config").glob("*.py"):
        for figure in re.findall(r"([\d.]+) h of one H100 \(docs/speed.md\)", path.read_text()):
            assert figure == rounded(hours(path.stem), figure), (path.stem, hours(path.stem))
            seen += 1
    assert seen


def test_which_micro_batch_fits():
    """The largest that leaves 2 GB free and keeps the 480 sequences of a step."""
    for sizes, name in re.findall(r"([\d, ]+) for `(\w+)`", README):
        for gigabytes, size in zip((24, 40, 80), sizes.split(","), strict=True):
            fits = [n for n in range(1, 481) if 480 % n == 0
                    and memory(name, n) <= (gigabytes - 2) * 1e9]
            assert int(size) == max(fits), (name, gigabytes, max(fits))


# -----------------------------------------------------------------------------
# Blocks of code


def test_use_from_python(run, tmp_path, monkeypatch, capsys):
    run(tmp_path / "out-pydoc-demo", max_iters=1)
    monkeypatch.chdir(tmp_path)
    exec(blocks(README, "py")[0], {})
    assert capsys.readouterr().out.split("done")[-1].count("The ")


def test_what_a_fork_adds_as_the_readme_says(monkeypatch, run, tmp_path, capsys):
    """Each of its classes, pasted into model.py, and a preset of its own: the run trains, resumes,
    and is sampled."""
    tables = {"template": "TEMPLATES", "ffn": "FFNS", "attention": "ATTENTIONS"}
    for table in tables.values():
        monkeypatch.setattr(model, table, dict(getattr(model, table)))
    classes = "\n".join(blocks(README, "python"))
    exec(classes, vars(model).copy())
    added = {option: re.search(rf'{table}\["(\w+)"\]', classes)[1]
             for option, table in tables.items()}
    said = re.search(r"`template, ffn, attention = (.+?)`", README)[1]
    assert tuple(added.values()) == tuple(re.findall(r"\w+", said))
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
    for text in PAGES.values():
        text = re.sub(r"^\| [^|]*\|(?=.*\|$)", "|", text, flags=re.MULTILINE)
        inline = re.findall(r"`((?:[A-Z_]+=\S+ )?(?:python|torchrun) [^`]+)`", text)
        for command in "\n".join(blocks(text, "sh")).splitlines() + inline:
            words = [word for word in shlex.split(command, comments=True) if word != "..."]
            if "-c" in words:
                compile(words[words.index("-c") + 1], command, "exec")
            name = next((word for word in words if word.removesuffix(".py") in PROGRAMS), None)
            unclear = ("--help", "path/to", "[", "COMMAND", "NAME", "|", "mine.py")
            if name is None or any(word in command for word in unclear):
                continue
            options = words[words.index(name) + 1:]
            if name == "bench.py":
                bench.read_options(options)
            else:
                read_config(CONFIGS[name], options,
                            positional="corpus" if name == "prepare.py" else None)
            seen += 1
    assert seen >= 40


def test_options_exist():
    """What stands between backticks as --option, with its value where it has one."""
    classes = [*CONFIGS.values(), *(cls for cls, _ in bench.COMMANDS.values())]
    known = {field.name for cls in classes for field in fields(cls)} | {"help"}
    others = {"nproc_per_node", "standalone", "max-restarts", "shutdown-timeout", "extra",
              "index-url", "model_args", "signals-to-handle", "shm-size"}  # torchrun's, uv's, ...
    for name, text in PAGES.items():
        for code in re.findall(r"`([^`\n]+)`", without_blocks(text)):
            assert set(re.findall(r"--([\w-]+)", code)) <= known | others, (name, code)


def test_the_family_exists():
    table = re.search(r"\| `--template` \|.*?\n\n", README, re.DOTALL)[0]
    for row in table.strip().splitlines()[2:]:
        assert set(re.findall(r"`(\w+)`", row.split("|")[1])) <= model.TEMPLATES.keys(), row


def test_make_demo_written_out():
    """The README's commands are the Makefile's, and the workflow's on macOS and Windows."""
    commands = next(b for b in blocks(README, "sh") if "config/pydoc_demo.py" in b).splitlines()
    made = (ROOT / "Makefile").read_text().split("demo: .venv/demo\n")[1].split("\n\n")[0]
    assert commands[2:] == [line.strip().removeprefix("$(BIN)/")
                            for line in made.splitlines()[:3]]
    workflow = (ROOT / ".github/workflows/test.yml").read_text()
    windows = re.search(r"On Windows the first line is, in PowerShell, `(.+?)`", README)[1]
    for first in (commands[0], windows):
        assert "\n".join(" " * 10 + line for line in (first, *commands[1:])) in workflow


# -----------------------------------------------------------------------------
# Troubleshooting: the messages are what the programs print


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in: data/mine, other, letters; config; and in out a finished run."""
    rng = np.random.default_rng(0)
    for name, n in (("mine", 2000), ("other", 500)):
        write_data(tmp_path / "data" / name, rng.integers(256, size=n), rng.integers(256, size=300))
    write_data(tmp_path / "data" / "letters", rng.integers(26, size=500), vocab_size=26,
               tokenizer="char", alphabet="abcdefghijklmnopqrstuvwxyz")
    shutil.copytree(ROOT / "config", tmp_path / "config")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_messages_are_what_the_programs_print(place, monkeypatch, capsys):
    """Every error that troubleshooting.md quotes is printed by one of these commands."""
    tiny = option_words(**TINY | dict(dataset="mine"))
    train.main([*tiny, "--max_iters=2"])
    Path("src").mkdir()
    Path("src/package.json").write_text('{"name": "x", "version": 1}')
    Path("book.txt").write_bytes(b"caf\xe9")
    offline = Mock(side_effect=urllib.error.URLError("no network"))
    new = "train --out_dir=new"
    cases = [  # a command, and what is replaced while it runs
        ("train config/shakespere_char.py",),
        ("train --min_lr=0.1",),
        (f"{new} --wandb_log", sys.modules, "wandb", None),
        ("prepare shakespeare_char", urllib.request, "urlopen", offline),
        ("prepare text --tokenizer=bytes --input src",),
        ("prepare text --tokenizer=bytes --input book.txt",),
        ("train --init_from=resume --dataset=letters",),
        ("train --init_from=resume --dataset=other",),
        (f"{new} --learning_rate=1e38 --warmup_iters=0 --eval_interval=1",),
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
