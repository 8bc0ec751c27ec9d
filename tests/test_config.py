"""config/__init__.py: values, presets, the command line, --help, and nanoGPT's option names."""

import re
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest

from config import coerce, describe, help_text, read_config
from sample import SampleConfig
from support.errors import UserError, cli
from train import TrainConfig


@dataclass
class Options:
    """What the tests read."""

    width: int = 8  # columns
    rate: float = 0.5  # steps
    # A comment that stands
    # above its option.
    floor: float | None = None
    name: str = "run"  # anything
    stop: str | None = None  # text
    fast: bool = False  # a switch
    quick: bool | None = None  # a switch that may be auto
    kind: Literal["cosine", "wsd"] = "cosine"  # a choice
    inputs: tuple[str, ...] = ()  # files

    def __post_init__(self):
        problems = [f"{name}={value}: must be positive"
                    for name, value in (("width", self.width), ("rate", self.rate)) if value <= 0]
        if problems:
            raise ValueError("\n".join(problems))


def read(*argv):
    return read_config(Options, list(argv))[0]


def problems(*argv):
    with pytest.raises(UserError) as error:
        read(*argv)
    return str(error.value).splitlines()


@pytest.fixture
def preset(tmp_path):
    """preset(text) writes a preset file and returns its path."""
    def write(text, name="preset.py"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


# -----------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("name, word, value", [
    ("width", "12", 12), ("width", "-3", -3), ("width", "1e4", 10_000), ("width", "2.0", 2),
    ("width", 1e4, 10_000), ("width", "600_000", 600_000),
    ("rate", "1", 1.0), ("rate", 1, 1.0), ("rate", "-1e-4", -1e-4), ("rate", "3e-4", 3e-4),
    ("floor", "None", None), ("floor", "auto", None), ("floor", "AUTO", None),
    ("floor", None, None), ("floor", "0", 0.0), ("stop", "none", None), ("stop", "", ""),
    ("name", "none", "none"), ("name", "1e4", "1e4"), ("name", "a=b", "a=b"),
    ("fast", "true", True), ("fast", "TRUE", True), ("fast", "False", False),
    ("fast", "FALSE", False), ("fast", "1", True), ("fast", 0, False),
    ("quick", "Auto", None), ("quick", "true", True), ("kind", "wsd", "wsd"),
    ("inputs", "a.txt", ("a.txt",)), ("inputs", ["a", "b"], ("a", "b")),
])
def test_values(name, word, value):
    kind = {f.name: f.type for f in fields(Options)}[name]
    found = coerce(name, word, kind)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("name, word", [
    ("width", "12.5"), ("width", "many"), ("width", "None"), ("width", True), ("width", ""),
    ("width", "nan"), ("width", "inf"), ("width", [1]), ("rate", "fast"), ("rate", "inf"),
    ("rate", "nan"), ("rate", True), ("floor", "low"), ("name", 3), ("name", None), ("fast", "si"),
    ("fast", "2"), ("fast", None), ("quick", "perhaps"), ("kind", "linear"), ("kind", None),
    ("inputs", 3), ("inputs", [1, 2]),
])
def test_wrong_values_are_named(name, word):
    kind = {f.name: f.type for f in fields(Options)}[name]
    with pytest.raises(ValueError, match=re.escape(f"{name}={word}")) as error:
        coerce(name, word, kind)
    assert describe(kind) in str(error.value)


# -----------------------------------------------------------------------------
# The command line


def test_command_line():
    options = read("--width=3", "--rate", "2e-1", "--fast", "--name", "x y",
                   "--inputs", "a", "b", "--quick=none", "--stop=--")
    assert options == Options(3, 0.2, None, "x y", "--", True, None, "cosine", ("a", "b"))


def test_a_negative_number_is_a_value():
    assert read("--floor", "-1").floor == -1.0


def test_the_later_wins(preset):
    path = preset("width = 2\nname = 'preset'\n")
    assert read("--width=1", "--name=word", path) == Options(width=2, name="preset")
    assert read(path, "--width=1") == Options(width=1, name="preset")
    assert read(path, preset("width = 3\n", "other.py"), "--rate=1", "--rate=2").width == 3
    assert read("--rate=1", "--rate=2").rate == 2.0


@pytest.mark.parametrize("switch", [("--fast",), ("--fast", "true"), ("--fast=yes",)])
def test_a_bare_switch_does_not_swallow_what_follows(switch, preset):
    options = read(*switch, preset("width = 2\n"), "--fast", "--name=x")
    assert options == Options(width=2, fast=True, name="x")


def test_an_unknown_name_gets_the_nearest(preset):
    assert "width" in problems("--widht=3")[0].split("unknown option widht")[1]
    assert "rate" in problems("--rates", "3")[0].split("unknown option rates")[1]
    (line,) = problems(preset("widht = 3\n"))
    assert "preset.py" in line and "unknown option widht" in line and line.endswith("width?")
    assert "unknown option zzzzzz" in problems("--zzzzzz=1")[0]
    assert "wsd" in problems("--kind=wds")[0]


def test_all_problems_come_together(preset):
    lines = problems("--widht=3", preset("rate = 'high'\nzzz = 1\n"), "--fast=si", "no_such.py",
                     "--kind=linear", "--name")
    named = ("widht", "rate=high", "zzz", "no_such.py", "--name", "fast=si", "kind=linear")
    assert len(lines) == len(named)
    assert all(any(word in line for line in lines) for word in named)


@pytest.mark.parametrize("words", [("--width=0", "--rate=-1"), ("--width=0", "--rates=1"),
                                   ("--width=0", "--rate=fast")])
def test_broken_rules_come_together_with_the_rest(words):
    """A value that the dataclass refuses does not wait until the spelling is mended."""
    lines = problems(*words)
    assert len(lines) == 2 and any("width=0: must be positive" in line for line in lines)


def test_the_program_ends_with_code_2_and_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x.py", "--widht=3", "--rate=fast"])
    with pytest.raises(SystemExit) as stop:
        cli(lambda argv: read(*argv))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 2
    assert all(line.startswith("error: ") for line in lines)


def test_a_positional_option():
    config, given = read_config(Options, ["mine", "--width=1"], positional="name")
    assert config == Options(width=1, name="mine") and given == {"name", "width"}
    with pytest.raises(UserError, match="unexpected argument b"):
        read_config(Options, ["a", "b"], positional="name")


# -----------------------------------------------------------------------------
# Presets


def test_presets_compute_and_import(preset):
    """The values so far are a preset's globals; helpers are ignored."""
    options = read("--rate=8", preset("""
import math
import time
from os.path import join as join_path
floor = rate / 10
name = 'ft-' + str(int(time.time() * 0))
_private = 3
def double(x): return 2 * x
class Helper: pass
root = math.sqrt
width = double(int(root(16)))
"""))
    assert options == Options(width=8, rate=8.0, floor=0.8, name="ft-0")


def test_nanogpt_like_presets(preset):
    """The kinds of lines in nanoGPT's own files mean what they did."""
    config, given = read_config(TrainConfig, [preset("""
# finetune
import time
out_dir = 'out-x'
eval_interval = 5
eval_iters = 40
wandb_log = False # feel free to turn on
wandb_project = 'x'
wandb_run_name = 'ft-' + str(time.time())
dataset = 'x'
batch_size = 1
block_size = 32
gradient_accumulation_steps = 5 * 8
learning_rate = 3e-5
min_lr = learning_rate / 10
weight_decay = 1e-1
decay_lr = False
device = 'cpu'
compile = False
""")])
    assert config.eval_tokens == 40 * 32 and config.gradient_accumulation_steps == 40
    assert config.min_lr == pytest.approx(3e-6) and config.wandb_run_name.startswith("ft-")
    assert "eval_iters" in given and "time" not in given and "n_layer" not in given
    assert config.compile is False and config.decay_lr is False


def test_given_names(preset, tmp_path, monkeypatch):
    """`given` holds what was assigned, also a default said again, also through `import *`."""
    monkeypatch.syspath_prepend(tmp_path)
    preset("width = 8\n_hidden = 1\nname = 'base'\n", "base_preset.py")
    options, given = read_config(Options, [preset("""
from base_preset import *
rate = 0.5
"""), "--quick=auto"])
    assert options == Options(name="base")
    assert given == {"width", "name", "rate", "quick"}


def test_a_helpers_locals_are_not_given(preset):
    _, given = read_config(Options, [preset("def half(rate): width = rate / 2; return width")])
    assert given == set()


@pytest.mark.parametrize("text, said", [
    ("width = 1 / 0", ("line 1", "ZeroDivisionError")),
    ("name = 'x'\nwidth = undefined", ("line 2", "NameError", "undefined")),
    ("width = (3", ("line 1", "SyntaxError")),
    ("import no_such_module", ("line 1", "no_such_module")),
    ("raise SystemExit('no')", ("line 1", "SystemExit")),
    ("raise ValueError('two\\nlines')", ("line 1", "ValueError", "two")),
    ("assert width == 3", ("line 1", "AssertionError")),
])
def test_a_broken_preset_is_one_line(preset, text, said):
    (line,) = problems(preset(text))
    assert "preset.py" in line and all(word in line for word in said)


def test_a_missing_preset_gets_the_nearest(preset, tmp_path):
    preset("", "yurii_owt.py")
    (line,) = problems(str(tmp_path / "yuri_owt.py"))
    assert "no preset file" in line and line.endswith("yurii_owt.py?")


# -----------------------------------------------------------------------------
# --help


@pytest.mark.parametrize("cls", [Options, TrainConfig, SampleConfig])
def test_help_lists_every_option_with_its_comment(cls):
    text = help_text(cls, "how to use it")
    entries = dict(re.findall(r"^  --(\w+)=.*\[.+\]\n((?:      .+\n?)+)", text, re.MULTILINE))
    assert text.startswith("how to use it")
    assert list(entries) == [f.name for f in fields(cls)]
    assert all(comment.strip() for comment in entries.values())


def test_help_shows_default_type_and_comment(capsys):
    with pytest.raises(SystemExit) as stop:
        read_config(Options, ["--width=3", "--help"], usage="how to")
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "how to" in text
    assert "  --width=8   [integer]\n      columns\n" in text
    assert "[number or auto]\n      A comment that stands above its option.\n" in text
    assert "[cosine | wsd]" in text and "[true or false]" in text


# -----------------------------------------------------------------------------
# nanoGPT's names

NANOGPT = dict(  # every option of its train.py, with its default
    out_dir="out", eval_interval=2000, log_interval=1, eval_iters=200, eval_only=False,
    always_save_checkpoint=True, init_from="scratch", wandb_log=False, wandb_project="owt",
    wandb_run_name="gpt2", dataset="openwebtext", gradient_accumulation_steps=40, batch_size=12,
    block_size=1024, n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=False,
    learning_rate=6e-4, max_iters=600_000, weight_decay=1e-1, beta1=0.9, beta2=0.95, grad_clip=1.0,
    decay_lr=True, warmup_iters=2000, lr_decay_iters=600_000, min_lr=6e-5, backend="nccl",
    device="cuda", dtype="bfloat16", compile=True)
OUR_DEFAULTS = {"wandb_project", "wandb_run_name", "backend", "device", "dtype", "compile"}


def test_nanogpts_options_are_known_and_mean_the_same():
    ours = {f.name: f.default for f in fields(TrainConfig)}
    assert set(NANOGPT) <= set(ours)
    auto = {"lr_decay_iters": ours["max_iters"], "min_lr": ours["learning_rate"] / 10,
            "eval_iters": ours["eval_tokens"] / (12 * 1024) / 2}
    for name in NANOGPT.keys() - OUR_DEFAULTS:
        assert auto.get(name, ours[name]) == pytest.approx(NANOGPT[name]), name
    config, given = read_config(TrainConfig, [f"--{n}={v}" for n, v in NANOGPT.items()])
    assert given == set(NANOGPT)
    assert {n: getattr(config, n) for n in NANOGPT} == NANOGPT


def test_eval_iters_is_converted():
    config = TrainConfig(eval_iters=200, batch_size=12, block_size=1024)
    assert config.eval_tokens == 200 * 12 * 1024 and config.eval_iters == 200
    with pytest.raises(ValueError, match="eval_iters and eval_tokens"):
        TrainConfig(eval_iters=200, eval_tokens=1000)
    assert TrainConfig(eval_tokens=1000).eval_tokens == 1000


def test_sampling_options_of_nanogpt_are_known():
    names = dict(init_from="resume", out_dir="out", start="\n", num_samples=10, temperature=0.8,
                 max_new_tokens=500, top_k=200, seed=1337, device="cpu", dtype="float32",
                 compile=False)
    config, _ = read_config(SampleConfig, [f"--{n}={v}" for n, v in names.items()])
    assert {n: getattr(config, n) for n in names} == names


@pytest.mark.parametrize("options, said", [
    (dict(batch_size=0, log_interval=0), ("batch_size=0", "log_interval=0")),
    (dict(beta1=1.0, learning_rate=-1.0), ("beta1=1.0", "learning_rate=-1.0")),
    (dict(n_head=5, decay_fraction=0.0), ("n_head=5", "decay_fraction=0.0")),
    (dict(init_from="gpt"), ("init_from=gpt",)),
    (dict(schedule="linear", optimizer="sgd"), ("schedule=linear", "optimizer=sgd")),
    (dict(grad_clip=-1.0, warmup_iters=-1), ("grad_clip=-1", "warmup_iters=-1")),
])
def test_the_trainers_rules(options, said):
    with pytest.raises(ValueError) as error:
        TrainConfig(**options)
    lines = str(error.value).splitlines()
    assert len(lines) == len(said)
    assert all(any(word in line for line in lines) for word in said)


def test_imports_stay_light():
    """config needs no torch; train and sample neither datasets nor matplotlib, nor what of torch is
    slow to import."""
    subprocess.run([sys.executable, "-c", """
import sys, config
assert not {"torch", "numpy"} & sys.modules.keys()
import train, sample
assert not {"datasets", "matplotlib", "transformers", "tiktoken", "wandb", "torch._dynamo",
            "torch.distributed.tensor", "torch.distributed.checkpoint"} & sys.modules.keys()
"""], check=True, cwd=Path(__file__).parent.parent)
