"""sample.py. The decoder against plain computations: rows of different lengths and reused caches
against full forward passes, compiled steps against eager ones, stored matrices against autocast,
draws against their definition. The command: prompts, the stop text, whole characters, which
checkpoint, whose tokenizer.
"""

import io
import itertools
import os
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import option_words, refused, write_data
from torch.utils._python_dispatch import TorchDispatchMode
from variants import IDX, VARIANTS, assert_close, build, write_checkpoint

import model as model_module
import sample
from model import GPT, MLP, OutputProjection
from sample import DecodingCache, DecodingLinear, draw, store_matrices, stream

ROOT = Path(__file__).parent.parent
LENGTHS = (1, 5, 12, 30, 9, 13)  # block_size is 12
SEVERAL = ("gpt-qk_norm-rope", "nesterov-lie_trotter", "gd-add", "imex-2", "symplectic", "adamw",
           "x0-post-euler", "tmm-hourglass-each")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def prompts_of(lengths, seed=0):
    gen = seeded(seed)
    return [torch.randint(48, (n,), generator=gen) for n in lengths]


def padded(prompts, width=0, seed=1):
    """The rows, filled up with arbitrary ids, and their lengths."""
    idx = torch.randint(48, (len(prompts), max(width, *map(len, prompts))), generator=seeded(seed))
    for row, prompt in zip(idx, prompts, strict=True):
        row[: len(prompt)] = prompt
    return idx, torch.tensor([len(prompt) for prompt in prompts])


@torch.no_grad()
def greedy(model, prompts, n):
    """n tokens after each prompt, each by a full forward over its window alone: when that is full,
    its older half is dropped."""
    size, rows = model.config.block_size, []
    for prompt in prompts:
        window, row = prompt.tolist()[-size:], []
        for _ in range(n):
            if len(window) > size:
                window = window[-max(1, size // 2):]
            row.append(model(torch.tensor([window]))[0][0, -1].argmax().item())
            window.append(row[-1])
        rows.append(row)
    return torch.tensor(rows)


def decode(model, idx, lengths=None, n=15, **how):
    """What `stream` yields, (B, n); greedy unless `how` says else."""
    return torch.stack(list(stream(model, idx, n, lengths=lengths, **{"temperature": 0, **how})), 1)


# -----------------------------------------------------------------------------
# Rows of different lengths


@pytest.mark.parametrize("name, block_size, lengths", [
    *((name, 12, LENGTHS) for name in SEVERAL),
    *(("nesterov-hourglass", size, (1, 2, 9, 7, 3, 8)) for size in (1, 2, 3, 7, 64)),
    *(("gpt", 12, lengths) for lengths in ((1,), (1, 1, 1), (12, 1), (25, 12, 11)))], ids=str)
def test_a_row_does_not_depend_on_the_others(name, block_size, lengths):
    """Short ones, ones that fill the context and longer ones; all run past it, unless it is 64."""
    model, prompts = build(**dict(VARIANTS[name], block_size=block_size)), prompts_of(lengths)
    expected = greedy(model, prompts, 25)
    for n, width, seed in ((1, 0, 1), (14, 0, 1), (25, 40, 2)):  # a padding that no row needs
        idx, counts = padded(prompts, width, seed)
        before = idx.clone(), counts.clone()
        assert torch.equal(decode(model, idx, counts, n), expected[:, :n])
        assert torch.equal(idx, before[0]) and torch.equal(counts, before[1])
    for prompt, row in zip(prompts, expected, strict=True):
        assert torch.equal(decode(model, prompt[None].int(), n=25)[0], row)  # ids of either width


@pytest.mark.parametrize("how", [dict(), dict(top_k=5), dict(top_p=0.8), dict(temperature=2.0)])
def test_a_draw_depends_neither_on_padding_nor_on_the_batch(how):
    model, prompts = build(**VARIANTS["nesterov-llama"]), prompts_of(LENGTHS)
    how = {"temperature": 1.0, "seed": 7, **how}
    outs = [decode(model, *padded(prompts, width, seed), 20, **how)
            for width, seed in ((0, 1), (0, 2), (50, 3))]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    for i, (prompt, row) in enumerate(zip(prompts, outs[0], strict=True)):
        alone = decode(model, prompt[None], n=12, numbers=[i], **how)
        assert torch.equal(alone[0], row[:12])


def test_padded_rows_of_the_vocabulary_are_never_drawn():
    model = build(bias=True, vocab_used=4)
    with torch.no_grad():
        model.lm_head.weight[4:] *= 100  # which would win
    assert model(IDX)[0].argmax() >= 4
    for how in (dict(), dict(top_k=4), dict(top_k=100), dict(top_p=0.9), dict(temperature=0)):
        assert decode(model, IDX, **{"temperature": 3.0, **how}).max() < 4


class LowRank(OutputProjection):
    def forward(self, x):
        return x @ self.weight.T


class Bare(MLP):
    """A linear, and a bare matrix behind it."""

    role = "matrix"

    def __init__(self, config):
        super().__init__(config)
        self.matrix = torch.nn.Parameter(torch.zeros(config.n_embd, config.n_embd))

    def forward(self, x):
        return super().forward(x) @ self.matrix


def test_a_forks_matrices_meet_one_precision(monkeypatch):
    monkeypatch.setitem(model_module.FFNS, "bare", Bare)
    low_rank, normed = build(torch.float32), build(torch.float32)
    low_rank.transformer.h[0].mlp.c_proj.__class__ = LowRank
    torch.nn.utils.parametrizations.weight_norm(normed.transformer.h[0].mlp.c_proj)
    for model in (low_rank, normed, build(torch.float32, ffn="bare")):
        text = model.generate(IDX, 9, temperature=0)
        store_matrices(model, torch.bfloat16)
        assert torch.equal(decode(model, IDX, n=9), text[:, -9:])


def test_a_forks_logits_are_those_of_each_token(monkeypatch):
    monkeypatch.setattr(GPT, "logits", lambda self, x: -self.lm_head(x))
    model = build(template="nesterov")
    assert torch.equal(decode(model, IDX, n=9), model.generate(IDX, 9, temperature=0)[:, -9:])


# -----------------------------------------------------------------------------
# The cache


def test_a_cache_can_be_used_anew():
    """After other rows, more or fewer of them, after the context was full, after a stream left
    midway, and after a pass that broke off behind one of two attention calls, as Ctrl-C does it."""
    model, cache = build(**VARIANTS["hourglass-strang"]), DecodingCache(12)

    def interrupt(*_):
        raise KeyboardInterrupt

    for seed, lengths in enumerate([(12, 5, 9, 13), (4, 2), (30, 1, 12, 5), (7,), (1, 1, 1)]):
        prompts = prompts_of(lengths, seed)
        expected, (idx, counts) = greedy(model, prompts, 15), padded(prompts)
        assert torch.equal(decode(model, idx, counts, cache=cache), expected)
        left = stream(model, idx, 15, temperature=0, lengths=counts, cache=cache)
        assert torch.equal(torch.stack(list(itertools.islice(left, 3)), 1), expected[:, :3])
        for passes in (0, 2):
            broken = stream(model, idx, 15, temperature=0, lengths=counts, cache=cache)
            list(itertools.islice(broken, passes))
            hook = model.transformer.h[0].mlp.register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                next(broken)
            hook.remove()


def test_a_cache_of_any_length_that_suffices():
    model, idx = build(bias=True), IDX[:, :4]
    expected = greedy(model, idx, 6)
    for size in (9, 10, 12, 100):  # the last token drawn is not read
        assert torch.equal(decode(model, idx, n=6, cache=DecodingCache(size)), expected)
    for size, n in ((8, 6), (3, 1), (11, 50)):
        with pytest.raises(ValueError, match=f"room for {size}"):
            decode(model, idx, n=n, cache=DecodingCache(size))
    for lengths in ((0, 3), (4, 5)):
        with pytest.raises(ValueError, match=r"1\.\.4"):
            decode(model, idx, torch.tensor(lengths))


class Operations(TorchDispatchMode):
    """Counts torch's operations, but those that only look at a tensor in another way."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        alias = operation._schema.returns[0].alias_info
        if alias is None or alias.is_write:
            self.counts[str(operation)] += 1
        return operation(*args, **kwargs or {})


@pytest.mark.parametrize("template", ["gd", "tmm", "imex"])
def test_a_layer_adds_to_an_eager_step_only_its_writes(template):
    """Beside what it computes for one token without a cache: on a GPU each operation waits for the
    launch of its kernel. The scalars are mapped beforehand."""
    added = []
    for n_layer in (1, 3):
        model = build(torch.float32, template=template, n_layer=n_layer)
        store_matrices(model, torch.float32)
        tokens = stream(model, IDX[:2, :3], 5)
        next(tokens)
        with Operations() as step:
            next(tokens)
        with torch.no_grad(), Operations() as alone:
            model(IDX[:2, :1])
        added.append(step.counts - alone.counts)
        assert not {"aten.sigmoid.default", "aten.softplus.default"} & step.counts.keys()
    calls = model.transformer.h[0].steps[0].oracle_calls
    assert added[1] - added[0] == {"aten.copy_.default": 2 * 2 * calls}


# -----------------------------------------------------------------------------
# Compiled steps


@pytest.fixture
def graphs(monkeypatch):
    """graphs(backend) -> torch's counts, nothing remembered from other models, no fallback to
    eager. inductor's C++ compiler takes a second for each kernel, the backend "eager" none."""
    def compile_with(backend):
        compile = torch.compile
        monkeypatch.setattr(torch, "compile", lambda model, options, **how: compile(
            model, backend=backend, **how))
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        return torch._dynamo.utils.counters

    with torch._dynamo.config.patch(error_on_recompile=True, suppress_errors=False):
        yield compile_with
    torch._dynamo.reset()


@pytest.mark.parametrize("backend, name", [
    ("eager", "gpt"), ("eager", "hourglass-strang"), ("inductor", "nesterov-hourglass")])
def test_all_steps_are_one_graph(graphs, backend, name):
    """While lengths grow, over a full context, and for other prompts with the same cache; of the
    same numbers as eager steps."""
    if backend == "inductor" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("inductor needs a C++ compiler on the CPU")
    model = build(torch.float32, **dict(VARIANTS[name], n_layer=1, ffn_depth=2))
    counts, cache = graphs(backend), DecodingCache(12)
    for seed, lengths in enumerate([(2, 5, 1), (9, 3, 14), (4, 4, 4)]):
        prompts = prompts_of(lengths, seed)
        out = decode(model, *padded(prompts), 20, cache=cache, compile=True)
        assert torch.equal(out, greedy(model, prompts, 20))
        assert counts["stats"]["unique_graphs"] == 1 and not counts["graph_break"]


@pytest.mark.parametrize("rows, how", [(6, dict(top_k=5, top_p=0.8)), (6, dict()), (1, dict())])
def test_compiled_draws_are_the_eager_ones(graphs, rows, how):
    """With the matrices stored in bf16; texts of any length, over new caches of a size, are one
    graph."""
    model = build(torch.float32, **dict(VARIANTS["nesterov-llama"], n_layer=1))
    store_matrices(model, torch.bfloat16)
    prompts, how = prompts_of(LENGTHS[-rows:]), dict(temperature=1.3, seed=3, **how)
    expected = {n: decode(model, *padded(prompts), n, **how) for n in (20, 25)}
    counts = graphs("aot_eager")
    for n, drawn in expected.items():
        cache = DecodingCache(12)
        found = decode(model, *padded(prompts), n, compile=True, cache=cache, **how)
        assert torch.equal(found, drawn) and counts["stats"]["unique_graphs"] == 1


def test_steps_that_do_not_compile_run_eagerly(monkeypatch):
    """As where nobody asked for it: on a GPU, for a long text."""
    def broken(*_):
        raise RuntimeError("no compiler")

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, options, **how: compile(
        step, backend=broken, **how))
    model = build(**VARIANTS["gpt"])
    torch._dynamo.reset()
    with torch._dynamo.config.patch(suppress_errors=True):
        found = decode(model, IDX[:1, :3], n=5, compile=True)
    assert torch.equal(found, decode(model, IDX[:1, :3], n=5))


@pytest.mark.parametrize("options, compiled, tuned", [
    (["--max_new_tokens=500"], False, False), (["--max_new_tokens=2000"], True, False),
    (["--max_new_tokens=150000"], True, True), (["--max_new_tokens=5", "--compile"], True, False),
    (["--max_new_tokens=9000", "--compile=False"], False, False),
    (["--max_new_tokens=5", "--compile", "--tune"], True, True)])
def test_short_texts_are_not_compiled(out, monkeypatch, options, compiled, tuned):
    """On a GPU, where compiling takes half a minute."""
    monkeypatch.setattr(sample, "can_compile", lambda wanted, device: wanted is not False)
    seen = []
    monkeypatch.setattr(sample, "stream", lambda *_, compile, tune: seen.append((compile, tune)) or
                        iter([]))
    out(*options)
    assert seen == [(compiled, tuned)]
    assert torch.backends.cuda.cudnn_sdp_enabled() == compiled


# -----------------------------------------------------------------------------
# Matrices stored in the precision of the products


@torch.no_grad()
def stored_and_autocast(dtype, rows=2, **options):
    """Pairs of outputs: logits of all tokens and of the last, losses, and step by step with a
    cache. The tables stay as they are."""
    plain, stored = build(torch.float32, **options), build(torch.float32, **options)
    tables = {n: p.clone() for n, p in stored.named_parameters()
              if n.split(".")[1] in ("wte", "wpe", "vte", "vpe")}
    for _ in range(2):  # once more changes nothing
        store_matrices(stored, dtype)
    for name, module in stored.named_modules():
        kind = dtype if isinstance(module, torch.nn.Linear) else torch.float32
        assert all(p.dtype == kind for p in module.parameters(recurse=False)), name
    assert all(torch.equal(stored.get_parameter(name), table) for name, table in tables.items())
    assert torch.equal(stored.lm_head.weight, tables["transformer.wte.weight"].to(dtype))

    def outputs(model):
        idx, cache = IDX[:rows], DecodingCache(12)
        cache.crop(torch.zeros(rows, dtype=torch.long))
        yield from model(idx, idx)
        yield model(idx)[0]
        yield model(idx[:, :1])[0]
        for t in (slice(0, 5), slice(5, 6), slice(6, 7), slice(7, 10)):
            yield model(idx[:, t], cache=cache)[0]

    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        expected = list(outputs(plain))
    return list(zip(outputs(stored), expected, strict=True))


@pytest.mark.parametrize("name", [*SEVERAL, "llama", "polyak-read", "tmm-hourglass-euler"])
def test_stored_matrices_give_the_numbers_of_autocast(name):
    """Bit for bit; one row, a token at a time, takes the path of vectors."""
    for dtype, rows, tolerance in ((torch.bfloat16, 2, 0), (torch.float16, 2, 0),
                                   (torch.float32, 1, 1e-5)):
        for a, b in stored_and_autocast(dtype, rows, **VARIANTS[name]):
            assert a.dtype == b.dtype
            assert_close(a.float(), b.float(), tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_complex_buffer_stays_complex(dtype):
    """As a fork's rotations may be."""
    model = torch.nn.Linear(4, 4)
    model.register_buffer("angles", torch.full((2,), 1j))
    store_matrices(model, dtype)
    assert torch.equal(model.angles, torch.full((2,), 1j))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(16,), (1, 1, 16), (3, 1, 16)])
@torch.no_grad()
def test_one_row_is_multiplied_as_a_vector(monkeypatch, shape, bias, dtype, tolerance):
    torch.manual_seed(0)
    linear, x = DecodingLinear(16, 24, bias=bias).to(dtype), torch.randn(shape).to(dtype)
    expected = F.linear(x.double(), *(p.double() for p in linear.parameters()))
    vectors, mv = [], torch.mv
    monkeypatch.setattr(torch, "mv", lambda weight, x: vectors.append(x) or mv(weight, x))
    for rows in (x, torch.stack([x, x], -1)[..., 0]):  # which is not contiguous
        assert_close(linear(rows).double(), expected, tolerance)
    assert len(vectors) == (2 if x.numel() == 16 else 0)


# -----------------------------------------------------------------------------
# Draws


def definition(row, temperature=1.0, top_k=None, top_p=None):
    """The probabilities of a draw, in numpy: of the k likeliest tokens, then of the smallest
    set whose probability reaches p."""
    p = np.exp(row / temperature - (row / temperature).max())
    likeliest = np.argsort(-p)
    if top_k is not None:
        p[likeliest[top_k:]] = 0
    p /= p.sum()
    if top_p is not None:
        size = 1
        while p[likeliest[:size]].sum() < top_p:
            size += 1
        p[likeliest[size:]] = 0
    return p / p.sum()


@pytest.mark.parametrize("how", [
    dict(), dict(top_k=1), dict(top_k=3), dict(top_k=8), dict(top_k=100), dict(top_p=1e-9),
    dict(top_p=0.5), dict(top_p=0.9), dict(top_k=4, top_p=0.8), dict(top_k=100, top_p=0.6),
    dict(temperature=0.3, top_p=0.9), dict(temperature=2.0, top_k=6, top_p=0.7)], ids=str)
def test_draws_have_the_defined_probabilities(how, n=20_000):
    """Two rows at once, neither in order of likelihood; 5 standard deviations."""
    rows = 1.5 * torch.randn(2, 8, generator=seeded(7))
    uniform = torch.rand(2 * n, generator=seeded())
    drawn = draw(rows.repeat_interleave(n, 0), uniform, **how).view(2, n)
    for row, ids in zip(rows.double().numpy(), drawn, strict=True):
        p, f = definition(row, **how), np.bincount(ids.numpy(), minlength=8) / n
        assert (f[p == 0] == 0).all(), (f, p)
        assert (np.abs(f - p) <= 5 * np.sqrt(p * (1 - p) / n) + 1e-12).all(), (f, p)


@pytest.mark.parametrize("top_p, expected", [
    (0.4, {3}), (0.4001, {3}), (0.5, {3}), (0.6999, {1, 3}), (0.7, {1, 3}), (0.75, {1, 3}),
    (0.7501, {1, 3, 4}), (0.875, {1, 3, 4}), (1.0, {0, 1, 3, 4, 5})])
def test_top_p_at_the_edge(top_p, expected):
    """Probabilities that floats have exactly, out of order: the smallest set that reaches p."""
    rows = (torch.tensor([1, 4, 0, 8, 2, 1]) / 16).double().log().repeat(2000, 1)
    uniform = torch.rand(2000, generator=seeded())
    assert set(draw(rows, uniform, top_p=top_p).tolist()) == expected


def test_the_ends_of_a_draw():
    """At 0 and just below 1 no token is drawn that has no probability."""
    for width in (1, 3, 1000, 50257):
        logits = torch.full((2, width + 2), -torch.inf)
        logits[:, 1:-1] = 3 * torch.randn(2, width, generator=seeded(width))
        drawn = draw(logits, torch.tensor([0.0, 1 - 2**-24]))
        assert (1 <= drawn).all() and (drawn <= width).all()


# -----------------------------------------------------------------------------
# The command


LETTERS = "abcdefghijklmnopqrstuvwxyz"
CHARS = {"tokenizer": "char", "alphabet": LETTERS, "vocab_size": 26, "padded_vocab_size": 26}
RULE = "-" * 15 + "\n"  # between samples


@pytest.fixture
def out(tmp_path, capsys):
    """out(*words, **options): what sample.py prints; 26 letters, one token each."""
    write_checkpoint(tmp_path / "out" / "ckpt.pt", CHARS)

    def go(*argv, **options):
        capsys.readouterr()
        defaults = dict(out_dir=tmp_path / "out", device="cpu", dtype="float64", num_samples=1,
                        start="abc", max_new_tokens=12)
        sample.main([*option_words(**{**defaults, **options}), *argv])
        return capsys.readouterr().out

    return go


def test_greedy_and_seeds(out, monkeypatch):
    """Greedy text does not depend on the number of samples; a seed gives the same samples again.
    Without compilation torch's compiler, which takes seconds, is not loaded."""
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", None)
    text = out(temperature=0)
    assert text == out(temperature=0, seed=2) == out(temperature=1e-6) == out(top_k=1)
    assert text == out(top_p=1e-9, top_k="None")
    assert len(text.rstrip("\n")) == 3 + 12 and text.startswith("abc")
    assert out(temperature=0, num_samples=3) == RULE.join([text] * 3)
    samples = out(num_samples=4)
    assert samples == out(num_samples=4) != out(num_samples=4, seed=2)
    assert len(set(samples.split(RULE))) == 4
    hot = out(top_k="None", temperature=50.0, max_new_tokens=200)
    assert set(hot) == set(LETTERS + "\n")  # top_k=None keeps all


PROMPT = "Zwölf 😀\r\nzwei\n<|endoftext|>a"


@pytest.mark.parametrize("source", ["text", "file", "stdin"])
def test_prompts_arrive_whole(out, tmp_path, monkeypatch, source):
    """Umlauts, an emoji, a line end and the end of text, as tokens and in what is printed."""
    write_checkpoint(tmp_path / "out" / "ckpt.pt")
    seen = []

    def one_token(model, idx, *_, **__):
        seen.extend(idx[0].tolist())
        yield torch.tensor([ord("!")])

    monkeypatch.setattr(sample, "stream", one_token)
    marked = PROMPT.encode("utf-8-sig")  # a byte-order mark is no character
    (tmp_path / "prompt.txt").write_bytes(marked)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(marked), "utf-8"))
    start = {"text": PROMPT, "file": f"FILE:{tmp_path}/prompt.txt", "stdin": "-"}[source]
    line_end = "\r\n" if source == "text" else "\n"  # a file's as Python reads them
    assert out(start=start) == PROMPT.replace("\r\n", line_end) + "!\n"
    assert seen == [*f"Zwölf 😀{line_end}zwei\n".encode(), 256, ord("a")]


@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite(out, tmp_path, temperature):
    write_checkpoint(tmp_path / "out" / "ckpt.pt", CHARS)
    checkpoint = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    checkpoint["model"]["transformer.ln_f.weight"] *= 1e5
    torch.save(checkpoint, tmp_path / "out" / "ckpt.pt")
    (_,) = refused(lambda: out(dtype="float16", temperature=temperature), "--dtype=float32")
    assert out(dtype="float32", temperature=temperature)


def test_a_program_reads_standard_input_and_prints_utf8(tmp_path):
    write_checkpoint(tmp_path / "ckpt.pt")
    command = [sys.executable, "sample.py", f"--out_dir={tmp_path}", "--start=-", "--device=cpu",
               "--num_samples=1", "--max_new_tokens=5"]
    done = subprocess.run(command, cwd=ROOT, input="Grüße 😀".encode(), capture_output=True,
                          env=os.environ | {"LC_ALL": "C"})
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.startswith("Grüße 😀".encode())


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    """scripted(*rows, **options): the pieces to print when the model's tokens are these bytes (256
    is the end of text), one row a sample."""
    write_checkpoint(tmp_path / "out" / "ckpt.pt")

    def go(*rows, **options):
        rows = [list(row) for row in rows]
        length = max(map(len, rows))
        made = torch.tensor([row + [ord(".")] * (length - len(row)) for row in rows])
        monkeypatch.setattr(sample, "stream", lambda *_, **__: iter(made.T))
        config = sample.SampleConfig(out_dir=str(tmp_path / "out"), num_samples=len(rows),
                                     start="P:", **options)
        return list(sample.draw_samples(*sample.load_model(config), config, "P:"))

    return go


def test_only_whole_characters_are_shown_as_they_are_made(scripted):
    assert scripted(b"abc", b"xyz")[1:4] == ["a", "b", "c"]
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
    ("two\n\nEND", r"\n\n", "two"),  # as shells leave it
    (r"two \nabla", r"\na", "two "),
    ("wäh😀rend", "😀", "wäh"),
    ("no such text", "END", "no such text"),
])
def test_the_stop_text_is_never_shown(scripted, text, stop, shown):
    pieces = scripted(text.encode(), stop=stop)
    assert "".join(pieces) == f"P:{shown}\n"
    so_far = [("".join(pieces[:i]) + "\n").removeprefix("P:") for i in range(1, len(pieces))]
    assert all(f"{shown}\n".startswith(piece[:-1]) for piece in so_far)  # never taken back


def test_every_sample_stops_on_its_own(scripted):
    text = "".join(scripted(b"aXbbbb", b"cccXdd", b"eeeeee", stop="X"))
    assert text == f"P:a\n{RULE}P:ccc\n{RULE}P:eeeeee\n"
    assert "".join(scripted(b"aX", b"X.", b"..", stop="X")) == f"P:a\n{RULE}P:\n{RULE}P:..\n"
    tokens = [*b"ab", 256, *b"cd"]
    assert "".join(scripted(tokens)) == "P:ab<|endoftext|>cd\n"
    assert "".join(scripted(tokens, stop="<|endoftext|>")) == "P:ab\n"


# -----------------------------------------------------------------------------
# Which checkpoint, and whose tokenizer


@pytest.mark.parametrize("always, files, chosen", [
    (True, ("ckpt.pt", "best.pt"), "ckpt.pt"), (False, ("ckpt.pt", "best.pt"), "best.pt"),
    (False, ("ckpt.pt",), "ckpt.pt"), (True, ("ckpt.pt",), "ckpt.pt"),
    (True, ("best.pt",), "best.pt")])
def test_which_checkpoint(tmp_path, always, files, chosen):
    for i, name in enumerate(files):
        write_checkpoint(tmp_path / name, seed=i, config={"always_save_checkpoint": always})
    named = sample.SampleConfig(init_from=str(tmp_path / files[0]))  # taken as named
    for config, name in ((sample.SampleConfig(out_dir=str(tmp_path)), chosen), (named, files[0])):
        model, tokenizer = sample.load_model(config)
        weights = torch.load(tmp_path / name, weights_only=True)["model"]
        assert tokenizer.name == "bytes" and not model.training
        assert all(torch.equal(w, weights[n]) for n, w in model.state_dict().items())
    config = sample.SampleConfig(out_dir="/nowhere")
    (_,) = refused(lambda: sample.load_model(config), "no checkpoint /nowhere/ckpt.pt")


def test_a_damaged_best_does_not_keep_from_the_latest(out, tmp_path):
    text = out(temperature=0)
    (tmp_path / "out" / "best.pt").write_bytes(b"half a file")
    assert out(temperature=0) == text


@pytest.mark.parametrize("size", [50257, 50304])
def test_a_vocabulary_of_gpt2s_size_is_gpt2s(out, tmp_path, gpt2_cache, size):
    """Also where the padding's rows would win."""
    path = tmp_path / "out" / "ckpt.pt"
    write_checkpoint(path, None, vocab_size=size)
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["model_args"]["vocab_used"]  # nanoGPT has no such thing
    checkpoint["model"]["transformer.wte.weight"][50257:] *= 100
    torch.save(checkpoint, path)
    text = out(start="Hello world", temperature=2.0, max_new_tokens=30)
    assert text.startswith("Hello world") and len(text) > 30


def test_a_checkpoint_decodes_with_its_own_tokenizer_or_none(out, tmp_path):
    """nanoGPT's alphabet is in its data folder, and counts where the checkpoint has none and its
    size is the model's."""
    path, alphabet = tmp_path / "out" / "ckpt.pt", "\n" + LETTERS.upper()
    capitals = dict(data_dir=tmp_path / "data", start="ABC", max_new_tokens=100)
    folder = write_data(tmp_path / "data" / "named", np.arange(27))
    (folder / "meta.json").unlink()
    (folder / "meta.pkl").write_bytes(pickle.dumps({"itos": dict(enumerate(alphabet))}))
    write_checkpoint(path, None, 27, config={"dataset": "named"})
    for _ in range(2):
        text = out(**capitals)
        assert text.startswith("ABC") and set(text) <= set(alphabet) and len(text) == 104
        (folder / "train.bin").unlink(missing_ok=True)  # its meta.pkl is enough, as for nanoGPT
    write_checkpoint(path, CHARS, config={"dataset": "named"})
    assert set(out(**capitals | {"start": "abc"})) <= set(LETTERS + "\n")  # not the data's
    (_,) = refused(lambda: out(**capitals), "alphabet", "ABC")
    for size in (25, 28, 257):  # a data folder of the same name, but another vocabulary
        write_checkpoint(path, None, size, config={"dataset": "named"})
        (_,) = refused(lambda: out(**capitals), "token ids", "named")
    write_checkpoint(path, vocab_size=200)
    (_,) = refused(out, "257", "200")
    write_checkpoint(path, None, 27)  # and says nothing of its data
    (_,) = refused(lambda: out(**capitals), "27 token ids", "does not say which", "safetensors")
