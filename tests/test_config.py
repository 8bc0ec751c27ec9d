"""config/__init__.py: values, presets, the command line, --help, and nanoGPT's option names."""

import contextlib
import io
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from conftest import refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config import check_rules, coerce, describe, option_types, read_config
from model import GPTConfig
from prepare import PrepareConfig
from sample import SampleConfig
from support.errors import UserError
from train import TrainConfig

settings.register_profile("ours", max_examples=25, deadline=None, derandomize=True,
                          suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("ours")
TABLE = {"gd": 1, "polyak": 2}


@dataclass
class Options:
    """One option of every type."""

    note: ClassVar[str] = "no option"
    width: int = 8  # columns
    limit: int | None = None  # an integer, perhaps
    rate: float = 0.5  # steps
    # A comment that stands
    # above its option.
    floor: float | None = None
    name: str = "run"  # anything
    stop: str | None = None  # text
    fast: bool = False  # a switch
    quick: bool | None = None  # a switch that may be auto
    kind: Literal["cosine", "wsd"] = "cosine"  # a choice
    power: Literal[1, 2] = 1  # a choice of numbers
    template: str = "gd"  # a key of an open table
    inputs: tuple[str, ...] = ()  # files

    @staticmethod
    def choices():
        return {"template": TABLE}

    def __post_init__(self):
        check_rules(self)

    def rules(self, rule):
        rule(self.width > 0, f"width={self.width}: must be positive")


def read(*argv):
    return read_config(Options, list(argv))[0]


def problems(*argv, cls=Options):
    return refused(lambda: read_config(cls, list(argv)))


def help_of(cls, *argv, capsys):
    with pytest.raises(SystemExit) as stop:
        read_config(cls, [*argv, "--help", "--width=many"], usage="how to use it")
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.fixture
def preset(tmp_path):
    """preset(text) writes a preset file and returns its path."""
    def write(text, name="preset.py"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


# -----------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("name, word, value", [
    ("width", "-3", -3), ("width", "1e4", 10_000), ("width", "2.0", 2), ("width", 1e4, 10_000),
    ("width", "600_000", 600_000), ("width", str(2**63 - 1), 2**63 - 1), ("rate", 1, 1.0),
    ("rate", "-1e-4", -1e-4), ("rate", "5e-324", 5e-324), ("rate", "1.7e308", 1.7e308),
    ("floor", "None", None), ("floor", "AUTO", None), ("floor", None, None), ("floor", "0", 0.0),
    ("stop", "none", None), ("stop", "~/x", "~/x"), ("name", "~/x", "/home/me/x"),
    ("inputs", ["~", "a~"], ("/home/me", "a~")),
    ("name", "none", "none"), ("name", "1e4", "1e4"), ("name", "a=b", "a=b"),
    ("fast", "TRUE", True), ("fast", "1", True), ("fast", "Yes", True), ("fast", "False", False),
    ("fast", 0, False), ("fast", "nO", False), ("quick", "Auto", None), ("kind", "wsd", "wsd"),
    ("power", "2", 2), ("template", "polyak", "polyak"),
    ("inputs", "a.txt", ("a.txt",)), ("inputs", ["a", "b"], ("a", "b")),
])
def test_values(name, word, value, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    found = coerce(name, word, option_types(Options)[name])
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("name, word", [
    ("width", "12.5"), ("width", "many"), ("width", "None"), ("width", True), ("width", ""),
    ("width", "nan"), ("width", "inf"), ("width", [1]), ("width", 2**63), ("rate", "fast"),
    ("width", -10**400), ("rate", 10**400), ("rate", b"1"), ("rate", 1j), ("floor", {}),
    ("rate", "inf"), ("rate", "nan"), ("rate", True), ("floor", "low"), ("name", 3), ("name", None),
    ("fast", "si"), ("fast", None), ("quick", "perhaps"), ("kind", "linear"), ("kind", None),
    ("power", "3"), ("template", "adam"), ("template", 3), ("inputs", 3), ("inputs", [1, 2]),
    ("name", ""), ("stop", ""), ("quick", ""), ("kind", ""), ("inputs", ""), ("inputs", ["a", ""]),
])
def test_wrong_values_are_named(name, word):
    kind = option_types(Options)[name]
    with pytest.raises(ValueError, match=re.escape(f"{name}={word}"[:60])) as error:
        coerce(name, word, kind)
    assert describe(kind) in str(error.value)


# -----------------------------------------------------------------------------
# The command line


def test_command_line():
    options = read("--width=3", "--rate", "2e-1", "--fast", "true", "--name", "x y", "--floor",
                   "-1", "--inputs", "a", "b", "--quick=none", "--stop=--")
    assert options == Options(width=3, rate=0.2, floor=-1.0, name="x y", stop="--", fast=True,
                              inputs=("a", "b"))


def test_an_unknown_name_gets_the_nearest(preset):
    path = preset("widht = 3\ntokens_total = 5\n")
    assert problems("--widht=3", "--rates", "3", "--zzzzzz=1", "--note=x", path) == [
        "unknown option widht; did you mean width?", "unknown option rates; did you mean rate?",
        "unknown option zzzzzz; --help lists the options",
        "unknown option note; --help lists the options",
        f"{path}: unknown option widht; did you mean width?",
        f"{path}: unknown option tokens_total; begin a name of your own with _"]


def test_all_problems_come_together(preset):
    """Broken rules, too: they do not wait until the spelling is mended."""
    lines = problems("--widht=3", preset("rate = 'high'\nzzz = 1\n"), "--fast=si", "no_such.py",
                     "--kind=linear", "--width=0", "--inputs", "--name")
    named = ("widht", "rate=high", "zzz", "fast=si", "no_such.py", "kind=linear",
             "--inputs needs a value", "--name needs a value", "width=0: must be positive")
    assert len(lines) == len(named)
    assert all(word in line for word, line in zip(named, lines, strict=True))


def test_words_that_belong_to_an_option(preset):
    """Without dashes, or several without quotation marks; a file may be a preset by any name, and
    a bare switch does not swallow it."""
    options = read("--width=2", preset("width = 3", "no_suffix"), "--fast", preset("rate = 2"))
    assert options == Options(width=3, rate=2.0, fast=True)
    hint = "an option is --name=value, with quotation marks around several words"
    assert problems("width=3", "--name", "Once", "upon", "a", "time,", "--fast", preset("")) == [
        f"no preset file {word}; {hint}" for word in ("width=3", "upon", "a", "time,")]


def test_a_model_is_not_the_name_of_a_template():
    for word, template in ("yurii", "nesterov"), ("YuriiFormer", "nesterov"), ("GPT", "gd"):
        (line,) = problems(f"--template={word}", cls=TrainConfig)
        assert line.endswith(f"did you mean {template}?")


def test_what_help_prints_can_be_given_back(preset, capsys):
    """Strings, too, that are no lines, and tuples; for all that was set before."""
    before = preset("name = 'a\\n'\ninputs = ['b', 'c']\nrate = 2")
    text = help_of(Options, before, capsys=capsys)
    printed = re.findall(r"^  (--\w+=.*)   \[", text, re.MULTILINE)
    assert len(printed) == len(fields(Options)) and r"--name=a\n" in printed
    assert read(before, *printed) == read(before)
    assert read_config(SampleConfig, [r"--start=\n"])[0].start == "\n"


def test_a_positional_option(tmp_path, preset):
    """With one, words are no presets: of prepare.py they may be data, which are not run."""
    ran = tmp_path / "ran"
    path = preset(f"open({str(ran)!r}, 'w')")
    config, given_by = read_config(Options, ["mine", "--width=1"], positional="name")
    assert config == Options(width=1, name="mine") and given_by == {"name": "", "width": ""}
    refused(lambda: read_config(Options, ["a", path], positional="name"),
            f"unexpected argument {path}; a file is --input={path}")
    assert not ran.exists()


def test_several_words_of_an_option_may_come_one_by_one(preset):
    """Those of a preset are replaced."""
    path = preset("inputs = ['p']")
    assert read(path, "--inputs=a", "--rate=1", "--inputs", "b", "c", "--rate=2") == \
        Options(rate=2.0, inputs=("a", "b", "c"))
    assert read("--inputs=a", "--rate=1", path).inputs == ("p",)
    config, _ = read_config(Options, ["--rate=1", "a", "b", "--width=3", "c"], positional="inputs")
    assert config.inputs == ("a", "b", "c")


# -----------------------------------------------------------------------------
# Presets


def test_presets_compute_and_import(preset):
    """The values so far are a preset's globals; helpers are ignored."""
    options, given_by = read_config(Options, ["--rate=8", path := preset("""
import math
import time
from os.path import join as join_path
floor = rate / 10
name = 'ft-' + str(int(time.time() * 0))
_private = 3
def double(x):
    quick = True
    return x * int(rate // 4) + int(root(0))
class Helper: pass
root = math.sqrt
width = double(int(root(16)))
""")])
    assert options == Options(width=8, rate=8.0, floor=0.8, name="ft-0")
    assert given_by == {"rate": "", "floor": path, "name": path, "width": path}


def test_who_set_an_option(preset, tmp_path, monkeypatch):
    """`given` holds what was assigned, also a default said again, also through `import *`."""
    monkeypatch.syspath_prepend(tmp_path)
    preset("width = 8\n_hidden = 1\nname = 'base'\n", "base_preset.py")
    first = preset("from base_preset import *\nrate = 0.5\n", "first.py")
    second = preset("width = 8\nfloor = 1\n", "second.py")
    options, given_by = read_config(Options, ["--floor=2", "--rate=1", first, second, "--name=x"])
    assert options == Options(floor=1.0, name="x")
    assert given_by == {"width": second, "name": "", "rate": first, "floor": second}


@pytest.mark.parametrize("text, line", [
    ('{"width": 7, "fast": true}', 1), ("width: 7\nfast: true", 1), ("rate = 1\nwidth == 7", 2)])
def test_what_assigns_nothing_is_no_preset(preset, text, line):
    """JSON, YAML and slips that are Python, and would change nothing."""
    assert problems(path := preset(text)) == [
        f"{path}, line {line}: assigns nothing; an option is name = value"]


@pytest.mark.parametrize("cls", [TrainConfig, SampleConfig])
def test_a_study_is_told_so(preset, cls):
    path = preset("study = 'x'\nvariants = ('a', 'b')\nn_layer = 2\n")
    assert problems(path, cls=cls) == [f"{path} is a study: python bench.py compare {path}"]


# -----------------------------------------------------------------------------
# --help


@pytest.mark.parametrize("cls", [Options, GPTConfig, TrainConfig, SampleConfig, PrepareConfig])
def test_help_lists_every_option_with_its_comment(cls, capsys):
    text = help_of(cls, capsys=capsys)
    entries = dict(re.findall(r"^  --(\w+)=.*\[.+\]\n((?:      .+\n?)+)", text, re.MULTILINE))
    assert text.startswith("how to use it")
    assert list(entries) == [f.name for f in fields(cls)]
    assert all(comment.strip() for comment in entries.values())


def test_help_shows_values_types_and_comments(preset, capsys):
    """The values that presets and options have set by then, whatever else is wrong."""
    text = help_of(Options, "--width=3", preset("rate = width / 2\nname = 'a\\nb'"), "--zzz",
                   preset("1 / 0", "broken.py"), capsys=capsys)
    assert "  --width=3   [integer]\n      columns\n" in text
    assert "  --rate=1.5   [number]\n" in text and r"--name=a\nb   [string]" in text
    assert "  --floor=auto   [number or auto]\n      A comment that stands above its" in text
    assert "[cosine | wsd]" in text and "[gd | polyak]" in text and "[true or false]" in text


# -----------------------------------------------------------------------------
# Whatever the words are


CLASSES = [(Options, None), (TrainConfig, None), (SampleConfig, None), (PrepareConfig, "corpus")]
NASTY = ["", "-", "--", "---", "-h", "=", "--=", "nan", "snan", "-inf", "1e400", "1e-999999999",
         "9" * 400, "9" * 5000, "-0", "none", "auto", "true", "1_0", "٣", "0x1", "\x00", "\n",
         "\ud800", ".", "/", "config", "text", "scratch", "x.pt", "gpt2"]
OPTION_NAMES = sorted({f.name for cls, _ in CLASSES for f in fields(cls)})
WORD = st.one_of(st.text(), st.sampled_from(NASTY), st.integers().map(str), st.floats().map(str))
SOUP = st.lists(st.one_of(
    WORD, st.builds("--{}".format, st.sampled_from(OPTION_NAMES)),
    st.builds("--{}={}".format, st.sampled_from(OPTION_NAMES) | st.text(), WORD)), max_size=8)


@pytest.mark.parametrize("cls, positional", CLASSES, ids=lambda v: getattr(v, "__name__", v))
@given(SOUP)
@settings(max_examples=50)
def test_any_words_are_a_config_or_a_user_error(tmp_path, monkeypatch, cls, positional, soup):
    monkeypatch.chdir(tmp_path)  # without presets
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            config, given_by = read_config(cls, soup, positional)
    except UserError as error:
        assert str(error).strip()
    except SystemExit as stop:
        assert stop.code == 0 and {"-h", "--help"} & set(soup) and output.getvalue()
    else:
        assert isinstance(config, cls) and given_by.keys() <= {f.name for f in fields(cls)}


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
NANOGPT_SAMPLE = dict(
    init_from="resume", out_dir="out", start="\n", num_samples=10, temperature=0.8,
    max_new_tokens=500, top_k=200, seed=1337, device="cpu", dtype="float32", compile=False)
OUR_DEFAULTS = {"wandb_project", "wandb_run_name", "backend", "device", "dtype", "compile"}


def test_nanogpts_options_mean_the_same():
    ours = {f.name: f.default for f in fields(TrainConfig)}
    auto = {"lr_decay_iters": ours["max_iters"], "min_lr": ours["learning_rate"] / 10,
            "eval_iters": ours["eval_tokens"] / (12 * 1024) / 2}
    for name in NANOGPT.keys() - OUR_DEFAULTS:
        assert auto.get(name, ours[name]) == pytest.approx(NANOGPT[name]), name


@pytest.mark.parametrize("cls, names", [(TrainConfig, NANOGPT), (SampleConfig, NANOGPT_SAMPLE)])
def test_nanogpts_options_are_known(cls, names):
    config, given_by = read_config(cls, [f"--{n}={v}" for n, v in names.items()])
    assert given_by == dict.fromkeys(names, "")
    assert {n: getattr(config, n) for n in names} == names


def test_imports_stay_light():
    """config and prepare need no torch; train and sample neither datasets nor matplotlib, nor what
    of torch is slow to import."""
    subprocess.run([sys.executable, "-c", """
import sys, config
assert not {"torch", "numpy"} & sys.modules.keys()
import prepare
assert not {"torch", "datasets", "pyarrow", "tiktoken", "model"} & sys.modules.keys()
import train, sample
assert not {"datasets", "matplotlib", "transformers", "tiktoken", "wandb", "torch._dynamo",
            "torch.distributed.tensor", "torch.distributed.checkpoint"} & sys.modules.keys()
"""], check=True, cwd=Path(__file__).parent.parent)
