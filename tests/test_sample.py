"""sample.py: prompts, draws, the stop text, whole characters, which checkpoint, whose tokenizer."""

import io
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import option_words, write_data

import sample
from model import GPT, GPTConfig
from support.errors import UserError, cli

ROOT = Path(__file__).parent.parent
BYTES = {"tokenizer": "bytes", "alphabet": "", "vocab_size": 257, "padded_vocab_size": 257}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
RULE = "-" * 15 + "\n"  # between samples


def write_checkpoint(path, tokenizer=BYTES, vocab_size=None, seed=0, **keys):
    """A model with weights large enough to have an opinion, as train.py saves one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=16, n_layer=2, n_head=2, n_embd=32, bias=False,
                          vocab_size=vocab_size or tokenizer["padded_vocab_size"]))
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    checkpoint = {"model": model.state_dict(), "model_args": vars(model.config), "config": {}}
    torch.save(checkpoint | ({"tokenizer": tokenizer} if tokenizer else {}) | keys, path)


@pytest.fixture
def out(tmp_path, capsys):
    """out(*words, **options): what sample.py prints; 26 letters, one token each."""
    letters = {"tokenizer": "char", "alphabet": LETTERS, "vocab_size": 26, "padded_vocab_size": 26}
    write_checkpoint(tmp_path / "out" / "ckpt.pt", letters)

    def go(*argv, **options):
        capsys.readouterr()
        defaults = dict(out_dir=tmp_path / "out", device="cpu", dtype="float64", num_samples=1,
                        start="abc", max_new_tokens=12)
        sample.main([*option_words(**{**defaults, **options}), *argv])
        return capsys.readouterr().out

    return go


def refused(call, *said):
    """The call is a user error of one line with these words."""
    with pytest.raises(UserError) as error:
        call()
    assert len(str(error.value).splitlines()) == 1
    assert all(word in str(error.value) for word in said), error.value


# -----------------------------------------------------------------------------
# Drawing


def test_greedy_does_not_depend_on_the_number_of_samples(out):
    text = out(temperature=0)
    assert text == out(temperature=0, seed=2) == out(temperature=1e-6) == out(top_k=1)
    assert text == out(top_p=1e-9, top_k="None")
    assert len(text.rstrip("\n")) == 3 + 12 and text.startswith("abc")
    assert out(temperature=0, num_samples=3) == RULE.join([text] * 3)


def test_the_seed_reproduces(out):
    text = out(num_samples=4)
    assert text == out(num_samples=4) != out(num_samples=4, seed=2)
    assert len(set(text.split(RULE))) == 4


def test_without_compilation_torchs_compiler_is_not_loaded(out, monkeypatch):
    """It takes seconds, and torch's function that marks a step loads it."""
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", None)
    assert out().startswith("abc")


def test_top_k_none_keeps_all(out):
    draws = dict(temperature=50.0, max_new_tokens=400)
    assert out(top_k="None", **draws) == out(top_k=26, **draws) == out(top_k=200, **draws)
    assert set(out(top_k="none", **draws)) == set(LETTERS + "\n")
    assert len(set(out(top_k=1, **draws))) < 26


@pytest.mark.parametrize("prompt", ["a", LETTERS[:16], LETTERS * 2])
def test_past_the_context(out, prompt):
    """16 tokens fit; the text goes on, and a prompt that is longer is printed whole."""
    text = out(start=prompt, max_new_tokens=50)
    assert text.startswith(prompt) and len(text) == len(prompt) + 50 + 1


# -----------------------------------------------------------------------------
# Prompts and characters


PROMPT = "Zwölf 😀\r\nzwei\n"


@pytest.mark.parametrize("source", ["text", "file", "stdin"])
def test_prompts_arrive_whole(out, tmp_path, monkeypatch, source):
    """Umlauts, an emoji and a CRLF, as the model's tokens and in what is printed."""
    write_checkpoint(tmp_path / "out" / "ckpt.pt")
    seen = []

    def stream(self, idx, *_, **__):
        seen.append(bytes(idx[0].tolist()))
        yield torch.tensor([ord("!")])

    monkeypatch.setattr(GPT, "stream", stream)
    (tmp_path / "prompt.txt").write_bytes(PROMPT.encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode()), "utf-8"))
    start = {"text": PROMPT, "file": f"FILE:{tmp_path}/prompt.txt", "stdin": "-"}[source]
    text = out(start=start)
    assert seen == [PROMPT.encode()]
    assert text == PROMPT + "!\n"


def test_a_program_reads_standard_input_and_prints_utf8(tmp_path):
    write_checkpoint(tmp_path / "ckpt.pt")
    command = [sys.executable, "sample.py", f"--out_dir={tmp_path}", "--start=-", "--device=cpu",
               "--num_samples=1", "--max_new_tokens=5"]
    process = subprocess.run(command, cwd=ROOT, input="Grüße 😀".encode(), capture_output=True,
                             env=os.environ | {"LC_ALL": "C"})
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("Grüße 😀".encode()) and process.stderr == b""


def test_end_of_text_in_a_prompt_is_the_token(out, tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "out" / "ckpt.pt")
    seen = []
    monkeypatch.setattr(GPT, "stream", lambda self, idx, *_, **__: iter(seen.append(idx) or ()))
    assert out(start="<|endoftext|>a") == "<|endoftext|>a\n"
    assert seen[0].tolist() == [[256, ord("a")]]


def test_an_unknown_vocabulary_says_what_to_do(tmp_path, out):
    write_checkpoint(tmp_path / "bare.pt", None, vocab_size=70)
    refused(lambda: out(init_from=tmp_path / "bare.pt"), "does not say which", "safetensors")


@pytest.fixture
def scripted(monkeypatch, tmp_path, out):
    """scripted(*rows, **options): the pieces to print when the model's tokens are these bytes (256
    is the end of text), one row a sample."""
    write_checkpoint(tmp_path / "out" / "ckpt.pt")

    def go(*rows, **options):
        rows = [list(row) for row in rows]
        length = max(map(len, rows))
        made = torch.tensor([row + [ord(".")] * (length - len(row)) for row in rows])
        monkeypatch.setattr(GPT, "stream", lambda *_, **__: iter(made.T))
        config = sample.SampleConfig(out_dir=str(tmp_path / "out"), num_samples=len(rows),
                                     start="P:", **options)
        return list(sample.draw_samples(*sample.load_model(config), config, "P:"))

    return go


def test_only_whole_characters_are_shown(scripted):
    pieces = scripted("aä😀b".encode())
    assert pieces == ["P:", "a", "", "ä", "", "", "", "😀", "b", "\n"]
    assert "".join(scripted("aä😀".encode()[:-1])) == "P:aä\N{REPLACEMENT CHARACTER}\n"
    assert "".join(scripted(b"a\xffb")) == "P:a\N{REPLACEMENT CHARACTER}b\n"
    assert "".join(scripted("a😀".encode(), "ä".encode() + b"...")) == f"P:a😀\n{RULE}P:ä...\n"


@pytest.mark.parametrize("text, stop, shown", [
    ("one END two", "END", "one "),
    ("END", "END", ""),
    ("one ENEND", "END", "one EN"),
    ("one EEND", "END", "one E"),
    ("one EN", "END", "one EN"),  # only a beginning, at the end
    ("one EN two", "END", "one EN two"),
    ("aabaabaac", "aabaac", "aab"),
    ("two\n\nEND", "\n\n", "two"),
    ("wäh😀rend", "😀", "wäh"),
    ("no such text", "END", "no such text"),
])
def test_the_stop_text_is_never_shown(scripted, text, stop, shown):
    pieces = scripted(text.encode(), stop=stop)
    assert "".join(pieces) == f"P:{shown}\n"
    so_far = [("".join(pieces[:i]) + "\n").removeprefix("P:") for i in range(1, len(pieces))]
    assert all(f"{shown}\n".startswith(piece[:-1]) for piece in so_far)  # never taken back


def test_the_end_of_text_token_can_stop(scripted):
    tokens = [*b"ab", 256, *b"cd"]
    assert "".join(scripted(tokens)) == "P:ab<|endoftext|>cd\n"
    assert "".join(scripted(tokens, stop="<|endoftext|>")) == "P:ab\n"


def test_every_sample_stops_on_its_own(scripted):
    rows = (b"aXbbbb", b"cccXdd", b"eeeeee")
    text = "".join(scripted(*rows, stop="X"))
    assert text == f"P:a\n{RULE}P:ccc\n{RULE}P:eeeeee\n"
    consumed = "".join(scripted(b"aX", b"X.", b"..", stop="X"))
    assert consumed == f"P:a\n{RULE}P:\n{RULE}P:..\n"


def test_text_appears_as_it_is_made(scripted):
    assert scripted(b"abc", b"xyz")[1:4] == ["a", "b", "c"]


# -----------------------------------------------------------------------------
# Which checkpoint, and whose tokenizer


@pytest.mark.parametrize("always, there, chosen", [
    (True, ("ckpt.pt", "best.pt"), "ckpt.pt"), (False, ("ckpt.pt", "best.pt"), "best.pt"),
    (False, ("ckpt.pt",), "ckpt.pt"), (True, ("ckpt.pt",), "ckpt.pt"),
    (True, ("best.pt",), "best.pt")])
def test_which_checkpoint(tmp_path, always, there, chosen):
    for i, name in enumerate(there):
        write_checkpoint(tmp_path / name, seed=i, config={"always_save_checkpoint": always})
    config = sample.SampleConfig(out_dir=str(tmp_path))
    weights = torch.load(tmp_path / chosen, weights_only=True)["model"]
    model, tokenizer = sample.load_model(config)
    assert tokenizer.name == "bytes" and not model.training
    assert all(torch.equal(w, weights[n]) for n, w in model.state_dict().items())
    model, _ = sample.load_model(sample.SampleConfig(init_from=str(tmp_path / there[0])))
    weights = torch.load(tmp_path / there[0], weights_only=True)["model"]
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])  # a file is taken as named


def test_a_file_is_not_openais_for_its_name(out, tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "gpt2-mine" / "ckpt.pt")
    monkeypatch.chdir(tmp_path)
    assert out(init_from="gpt2-mine/ckpt.pt").startswith("abc")


def test_a_run_of_train_can_be_sampled(run, out, tmp_path):
    run(tmp_path / "trained", template="nesterov", max_iters=2)
    text = out(out_dir=tmp_path / "trained", temperature=0, dtype="float32")
    assert text.startswith("abc") and text == out(init_from=tmp_path / "trained" / "ckpt.pt",
                                                  temperature=0, dtype="float32")


@pytest.fixture
def gpt2_cache(tmp_path, monkeypatch):
    cache = ROOT.parent / "shared" / "data" / "tiktoken_cache"
    if not cache.is_dir():
        pytest.skip("no copy of GPT-2's vocabulary")
    shutil.copytree(cache, tmp_path / "cache", copy_function=shutil.copyfile)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("size", [50257, 50304])
def test_a_vocabulary_of_gpt2s_size_is_gpt2s(out, tmp_path, gpt2_cache, size):
    """Also where the padding's rows would win."""
    write_checkpoint(tmp_path / "out" / "ckpt.pt", None, vocab_size=size)
    path = tmp_path / "out" / "ckpt.pt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["model_args"]["vocab_used"]  # nanoGPT has no such thing
    checkpoint["model"]["transformer.wte.weight"][50257:] *= 100
    torch.save(checkpoint, path)
    text = out(start="Hello world", temperature=2.0, max_new_tokens=30)
    assert text.startswith("Hello world") and len(text) > 30
    model, tokenizer = sample.load_model(sample.SampleConfig(out_dir=str(tmp_path / "out")))
    assert tokenizer.name == "gpt2" and model.config.vocab_used == 50257


def nanogpt_data(folder, alphabet):
    """What nanoGPT's data/shakespeare_char/prepare.py writes."""
    write_data(folder, np.arange(len(alphabet)))
    (folder / "meta.json").unlink()
    meta = {"vocab_size": len(alphabet), "itos": dict(enumerate(alphabet)),
            "stoi": {c: i for i, c in enumerate(alphabet)}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def test_a_nanogpt_checkpoints_alphabet_is_in_its_data_folder(out, tmp_path):
    write_checkpoint(tmp_path / "out" / "ckpt.pt", None, 27, config={"dataset": "theirs"})
    alphabet = "\n" + LETTERS.upper()
    nanogpt_data(tmp_path / "data" / "theirs", alphabet)
    text = out(start="ABC", data_dir=tmp_path / "data", max_new_tokens=100)
    assert text.startswith("ABC") and set(text) <= set(alphabet) and len(text) == 104


def test_a_checkpoint_never_decodes_with_another_tokenizer(out, tmp_path):
    theirs = dict(data_dir=tmp_path / "data", start="ABC")
    nanogpt_data(tmp_path / "data" / "theirs", LETTERS.upper())
    letters = {"tokenizer": "char", "alphabet": LETTERS, "vocab_size": 26, "padded_vocab_size": 26}
    path = tmp_path / "out" / "ckpt.pt"
    write_checkpoint(path, letters, config={"dataset": "theirs"})
    assert set(out(**theirs | {"start": "abc"})) <= set(LETTERS + "\n")  # its own, not the data's
    refused(lambda: out(**theirs), "alphabet", "ABC")
    for size in (25, 27, 257):  # a data folder of the same name, but another vocabulary
        write_checkpoint(path, None, size, config={"dataset": "theirs"})
        refused(lambda: out(**theirs), "token ids", "theirs")
    write_checkpoint(path, BYTES, 200)
    refused(lambda: out(), "257", "200")
    write_checkpoint(path, None, 26)  # and says nothing of its data
    refused(lambda: out(**theirs), "26 token ids")


# -----------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize("option, said", [
    ("num_samples=0", "at least 1"), ("max_new_tokens=0", "at least 1"),
    ("temperature=-1", "negative"), ("temperature=hot", "number"), ("top_k=0", "None keeps all"),
    ("top_k=-5", "None keeps all"), ("top_p=0", "(0, 1]"), ("top_p=1.5", "(0, 1]"),
    ("stop=", "empty"), ("dtype=int8", "float32"), ("numsamples=3", "num_samples"),
    ("start=", "prompt is empty"), ("start=FILE:/no/such/file", "/no/such/file"),
    ("device=gpu", "device=gpu"), ("init_from=no.pt", "no checkpoint no.pt"),
    ("out_dir=/nowhere", "no checkpoint /nowhere/ckpt.pt"),
])
def test_a_mistake_is_one_line(out, option, said):
    refused(lambda: out(f"--{option}"), option.split("=")[0].replace("out_dir", "/nowhere")
            .replace("init_from", "no.pt").replace("start", "prompt"), said)


def test_mistakes_come_together(out):
    with pytest.raises(UserError) as error:
        out(top_k=0, temperature=-1.0)
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", "truncated", "no model"])
def test_a_damaged_checkpoint_is_one_line(out, tmp_path, damage):
    path = tmp_path / "out" / "ckpt.pt"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "no model":
        torch.save({"weights": 1}, path)
    else:
        path.write_bytes(damage)
    refused(out, "ckpt.pt")


def test_a_damaged_best_does_not_keep_from_the_latest(out, tmp_path):
    text = out(temperature=0)
    (tmp_path / "out" / "best.pt").write_bytes(b"half a file")
    assert out(temperature=0) == text


def test_a_checkpoint_that_would_run_code_is_refused(out, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    torch.save({"model": Trap(), "model_args": {}}, tmp_path / "out" / "ckpt.pt")
    refused(out, "ckpt.pt")
    assert not (tmp_path / "trapped").exists()


def test_a_prompt_that_is_no_text_is_one_line(out, tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"\xff\xfe\x00")
    refused(lambda: out(start=f"FILE:{tmp_path}/prompt.txt"), "prompt.txt")


def test_a_program_ends_with_code_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sample.py", "--out_dir=/nowhere"])
    with pytest.raises(SystemExit) as stop:
        cli(sample.main)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: no checkpoint /nowhere")


def test_a_reader_that_leaves_and_a_terminal_without_the_letters_are_no_crash(tmp_path):
    write_checkpoint(tmp_path / "out" / "ckpt.pt")
    argv = [sys.executable, "sample.py", f"--out_dir={tmp_path / 'out'}", "--start=\u00e4",
            "--max_new_tokens=12", "--device=cpu"]
    ascii_only = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True,
                                env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert ascii_only.returncode == 0 and ascii_only.stdout.startswith("?"), ascii_only.stderr
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as gone:
        gone.stdout.close()
        assert "Traceback" not in gone.stderr.read().decode()
