"""In and out: GPT-2s of transformers, safetensors, and a GPT converted to a momentum model."""

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import SHARED, assert_same, refused
from variants import VARIANTS, assert_close

import bench
import sample
import train
from model import GPT, GPTConfig
from model import __file__ as model_file
from support.checkpoint import model_from, named_weights, read_checkpoint
from support.code import copy_code
from support.errors import UserError
from support.meta import TOKENIZER_KEYS
from support.tokenizer import Tokenizer
from tools import exchange

IDX = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])


def write(path, tokenizer="bytes", prefix="", **options) -> GPT:
    """A checkpoint of a small model with random weights, large enough to have an opinion."""
    torch.manual_seed(0)
    defaults = dict(block_size=16, vocab_size=257, n_layer=2, n_head=2, n_embd=32, ffn_depth=2)
    model = GPT(GPTConfig(**defaults | options)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    about = {"model_args": asdict(model.config), "config": {}}
    if tokenizer:
        meta = Tokenizer(tokenizer).to_meta()
        about["tokenizer"] = {k: meta[k] for k in TOKENIZER_KEYS if meta.get(k)}
    weights = {prefix + name: w for name, w in model.state_dict().items()}
    torch.save(about | {"model": weights}, path)
    return model


def logits(model, idx=IDX) -> torch.Tensor:
    with torch.no_grad():
        return model(idx, idx)[0]


def export(ckpt, out, *words):
    bench.main(["export", f"--ckpt={ckpt}", f"--out={out}", *words])
    return out


# -----------------------------------------------------------------------------
# transformers


@pytest.mark.parametrize("options", [
    dict(bias=True),
    dict(bias=False, activation="gelu_tanh", ffn_hidden=40, vocab_size=384, vocab_used=257,
         dropout=0.1, head_dim=16, velocity_init="zero", prefix="_orig_mod.")])
def test_transformers_has_our_logits(tmp_path, capsys, options):
    """And what it has we read back."""
    transformers = pytest.importorskip("transformers")
    ours = write(tmp_path / "a.pt", **options)
    export(tmp_path / "a.pt", tmp_path / "hf")
    assert "GPT2LMHeadModel; with its tokenizer (bytes)" in capsys.readouterr().out
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    c = theirs.config
    assert isinstance(theirs, transformers.GPT2LMHeadModel)
    assert (c.vocab_size, c.resid_pdrop, c.attn_pdrop, c.embd_pdrop, c.eos_token_id) == (
        ours.config.vocab_size, *3 * [ours.config.dropout], 256)
    padding = [*range(257, ours.config.vocab_size)]  # is never drawn
    assert (theirs.generation_config.suppress_tokens or []) == padding
    assert read_checkpoint(str(tmp_path / "hf"))["tokenizer"]["tokenizer"] == "bytes"
    back = GPT.from_pretrained(str(tmp_path / "hf"))
    assert back.config.activation == ours.config.activation and back.config.bias
    with torch.no_grad():
        assert (theirs(IDX).logits - logits(ours)).abs().max() < 2e-5
        expected = logits(ours.double())
        assert (theirs.double()(IDX).logits - expected).abs().max() < 1e-10
        assert (logits(back.double().eval()) - expected).abs().max() < 1e-10


@pytest.mark.parametrize("name, shape, parameters", [
    ("gpt2", (12, 12, 768), 124_439_808), ("gpt2-medium", (24, 16, 1024), 354_823_168),
    ("gpt2-large", (36, 20, 1280), 774_030_080), ("gpt2-xl", (48, 25, 1600), 1_557_611_200)])
def test_the_four_sizes(monkeypatch, name, shape, parameters):
    """Shapes only: OpenAI's counts."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        n_layer, n_head, n_embd = shape
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            n_layer=n_layer, n_head=n_head, n_embd=n_embd))
        monkeypatch.setattr(transformers.GPT2LMHeadModel, "from_pretrained",
                            lambda *_, **__: (theirs, {"missing_keys": set()}))
        ours = GPT.from_pretrained(name, {"dropout": 0.1})
    assert ours.get_num_params(False) == parameters
    c = ours.config
    assert (c.n_layer, c.n_head, c.n_embd, c.dropout) == (*shape, 0.1)
    assert (c.block_size, c.vocab_size, c.activation, c.bias) == (1024, 50257, "gelu_tanh", True)


@pytest.mark.parametrize("change, said", [
    (dict(activation_function="relu"), "activation_function=relu"),
    (dict(layer_norm_epsilon=1e-6), "layer_norm_epsilon=1e-06"),
    (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
    (dict(model_type="llama"), "only gpt2 is known here, not llama"),
    (dict(n_layer=3), "it has no transformer.h.2"),
    (dict(n_embd=48), "cannot load"), (dict(tie_word_embeddings=False), "(tied)"),
    ("untied", "(tied)"), ("short", "cannot load")])
def test_a_foreign_folder_is_refused(tmp_path, change, said):
    pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file

    write(tmp_path / "a.pt")
    weights = export(tmp_path / "a.pt", tmp_path / "hf") / "model.safetensors"
    if change == "short":
        os.truncate(weights, 5000)
    elif change == "untied":
        head = {"lm_head.weight": torch.ones(257, 32)}
        save_file(load_file(weights) | head, weights, {"format": "pt"})
    else:
        path = tmp_path / "hf" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert len(refused(lambda: read_checkpoint(str(tmp_path / "hf")), said)) == 1


@pytest.mark.parametrize("name, content", [
    ("tokenizer.json", {"model": {"vocab": {"a": 0, "b": 1}}}), ("vocab.json", {"model": 1}),
    ("tokenizer.json", {"model": {"vocab": [["a", 0.1]]}}), ("vocab.txt", 0), ("spiece.model", 0)])
def test_a_tokenizer_of_its_own_is_refused(tmp_path, gpt2_cache, name, content):
    """Of a model with as many rows as GPT-2: where it is read, sampled, judged, exported. GPT-2's
    own is known by its tokens."""
    pytest.importorskip("transformers")
    write(tmp_path / "a.pt", "gpt2", vocab_size=50257, n_embd=4, n_layer=1)
    folder = export(tmp_path / "a.pt", tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("tokenizer")["tokenizer"] == "gpt2"  # the folder's files decide alone
    (folder / "config.json").write_text(json.dumps(config))
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "vocab.json").write_text(json.dumps(vocab | {"<|endoftext|>": 50256}))
    for left in ("tokenizer.json", "vocab.json", None):
        assert read_checkpoint(str(folder))["tokenizer"] == {"tokenizer": "gpt2"}
        for path in folder.glob("tokenizer*" if left == "tokenizer.json" else "vocab*"):
            path.unlink()
    (folder / name).write_text(json.dumps(content))
    for main, words in ((sample.main, [f"--init_from={folder}"]),
                        (bench.main, ["eval", f"--ckpt={folder}", f"--data={tmp_path}/a.pt"]),
                        (bench.main, ["export", f"--ckpt={folder}", f"--out={tmp_path}/b"])):
        assert len(refused(lambda main=main, words=words: main(words), name, "of its own")) == 1


TEXTS = ["Hello world", " leading", "tabs\t\tand  spaces   \n\n\n  x \n", "it's we'll I'D don't",
         "naïve façade — “quotes” … £10", "日本語の文章です。한국어", "🙂👩‍👩‍👧 x²",
         "x<|endoftext|>y<|endoftext|>", "<|endoftext", "\x00\x7f\r\n\u00a0\u2003.", "",
         "1234567890", "def f(x):\n    return x ** 2  # squared\n" * 3, "ÀÉ" * 50, "a" * 300,
         "ß\u0301\ufeff"]


def test_the_tokenizer_is_gpt2s(tmp_path, gpt2_cache):
    transformers = pytest.importorskip("transformers")
    write(tmp_path / "a.pt", "gpt2", vocab_size=50304, vocab_used=50257, n_embd=4, n_layer=1)
    export(tmp_path / "a.pt", tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours, extra = Tokenizer("gpt2"), []
    if (story := SHARED / "openwebtext" / "documents.txt").exists():
        with story.open(encoding="utf-8") as file:
            extra = [file.read(100_000)]
    for text in [*TEXTS, *extra]:
        ids = ours.encode_prompt(text)
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text
    assert len(theirs) == 50257 and theirs.eos_token_id == 50256
    assert theirs.model_max_length == 16


CHARS = {"tokenizer": "char", "alphabet": "\n abcdé🙂", "vocab_size": 8, "padded_vocab_size": 8}


@pytest.mark.parametrize("meta", [Tokenizer("bytes").to_meta(), CHARS], ids=str)
def test_the_tokenizer_is_ours(tmp_path, meta):
    transformers = pytest.importorskip("transformers")
    assert "with its tokenizer" in exchange.save_tokenizer(meta, 16, str(tmp_path))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_meta(meta)
    for text in (TEXTS if meta["tokenizer"] == "bytes" else [" é\n\n a bad  cab🙂 ", "", "a"]):
        ids = ours.encode_prompt(text)
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids) == text
    assert len(theirs) == ours.n_vocab and theirs.eos_token_id == ours.eot
    assert list(theirs("a")) == ["input_ids", "attention_mask"]
    if meta is CHARS:
        with pytest.raises(Exception, match="(?i)unk"):
            theirs("x")


@pytest.mark.parametrize("meta", [
    {}, {"tokenizer": "cl100k_base"}, {**CHARS, "alphabet": ["<0>", "<0>", *"abcdef"]}], ids=str)
def test_a_tokenizer_without_such_a_form_is_left_out(tmp_path, meta):
    pytest.importorskip("transformers")
    name = meta.get("tokenizer", "unknown")
    assert f"without its tokenizer ({name})" in exchange.save_tokenizer(meta, 16, str(tmp_path))
    assert not os.listdir(tmp_path)


OWN_CODE = {
    # Strang: attention twice a layer
    "tmm-read": VARIANTS["tmm-read"] | dict(vocab_size=384, vocab_used=257),
    "hourglass-each": VARIANTS["nesterov-hourglass-each"], "llama": VARIANTS["llama"],
    "euler": dict(splitting="euler")}  # which has GPT-2's weights


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.torture if name == "llama" else ()) for name in OWN_CODE])
def test_transformers_computes_every_variant(tmp_path, monkeypatch, name):
    """The same logits and loss; greedy text with a cache and without one, of padded rows too."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    ours = write(tmp_path / "a.pt", **OWN_CODE[name])
    folder = export(tmp_path / "a.pt", tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    theirs, expected = theirs.eval(), logits(ours)
    assert "Block" in theirs._no_split_modules  # by device_map="auto", which transformers 4 refuses
    with torch.no_grad():
        assert torch.equal(theirs(IDX).logits, expected)
        assert torch.equal(theirs(IDX, logits_to_keep=3).logits, expected[:, -3:])
        loss = theirs(IDX, labels=IDX).loss
    assert loss == pytest.approx(ours(IDX[:, :-1], IDX[:, 1:])[1].item(), rel=1e-5)
    with pytest.raises(ValueError, match="position_ids"):
        theirs(IDX, position_ids=IDX)
    with torch.no_grad():  # transformers calls it so since 5.24
        rest = theirs(IDX[:, 3:], cache=theirs(IDX[:, :3], use_cache=True).past_key_values).logits
    assert_close(rest, expected[:, 3:], 1e-4)

    def generate(idx, **options):
        return theirs.generate(idx, max_new_tokens=8, do_sample=False, output_logits=True,
                               eos_token_id=999, return_dict_in_generate=True, **options)

    with pytest.raises(ValueError, match="leave cache_implementation out"):
        generate(IDX, cache_implementation="static")
    text = ours.generate(IDX, 8, temperature=0)
    for options in (dict(), dict(use_cache=False)):
        found = generate(IDX, **options)
        assert torch.equal(found.sequences, text)
        assert_close(torch.stack(found.logits, 1), logits(ours, text)[:, 7:15], 1e-4)
    rows, mask = torch.full((2, 8), 999), torch.ones(2, 8)
    rows[0, 3:], rows[1], mask[0, :3] = IDX[0, :5], IDX[1], 0
    found = generate(rows, attention_mask=mask, pad_token_id=999)
    short = ours.generate(IDX[:1, :5], 8, temperature=0)
    assert torch.equal(found.sequences[:, 8:], torch.cat((short[:, 5:], text[1:, 8:])))
    assert_close(torch.stack(found.logits, 1)[0], logits(ours, short)[0, 4:12], 1e-4)
    beams = [generate(IDX, num_beams=2, use_cache=cached).sequences for cached in (True, False)]
    assert torch.equal(*beams)
    with torch.no_grad():
        right = theirs(rows.flip(1), attention_mask=mask.flip(1)).logits[0, :5]
    assert_close(right, logits(ours, IDX[:1, :5].flip(1))[0], 1e-4)

    theirs.save_pretrained(tmp_path / "again")  # as after training there
    for back in (folder, tmp_path / "again"):
        assert torch.equal(logits(model_from(read_checkpoint(str(back))).eval()), expected)


@pytest.mark.parametrize("meta", [
    Tokenizer("bytes").to_meta(), pytest.param(CHARS, marks=pytest.mark.torture)], ids=str)
def test_a_task_has_our_scores(tmp_path, monkeypatch, meta):
    """With lm-eval's own backend for transformers; rows of several lengths are padded."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    pytest.importorskip("accelerate")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    model = write(tmp_path / "a.pt", None, template="tmm", vocab_size=meta["vocab_size"])
    checkpoint = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save(checkpoint | {"tokenizer": meta}, tmp_path / "a.pt")
    tokenizer, items = Tokenizer.from_meta(meta), []
    for i, context in enumerate(["a", "bad", "cab ", "é\n", "dad cab", "abc"] * 3):
        greedy = model.generate(torch.tensor([tokenizer.encode(context)]), 4, temperature=0)[0]
        copied = tokenizer.decode(greedy[len(tokenizer.encode(context)):]).split("d")[0]
        items.append({"context": context, "answers": ["ab", " c", "dab", copied or "b"],
                      "gold": i % 4})
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    kinds = {"multiple_choice": ("acc", dict(doc_to_target="gold", doc_to_choice="{{answers}}")),
             "generate_until": ("exact_match", dict(
                 doc_to_target="{{answers[3]}}",
                 generation_kwargs={"until": ["d"], "max_gen_toks": 4}))}
    files = {"test": f"{tmp_path}/items.jsonl"}
    if meta is CHARS:  # that backend generates only where there is an end-of-text id
        del kinds["generate_until"]
    for kind, (metric, more) in kinds.items():
        task = dict(task=kind, output_type=kind, metric_list=[{"metric": metric}],
                    dataset_path="json", dataset_kwargs={"data_files": files}, test_split="test",
                    doc_to_text="{{context}}", target_delimiter="")
        (tmp_path / f"{kind}.yaml").write_text(json.dumps(task | more))
    bench.main(["eval", f"--ckpt={tmp_path}/a.pt", f"--tasks={','.join(kinds)}", "--device=cpu",
                f"--include_path={tmp_path}", f"--json={tmp_path}/figures.json"])
    ours = json.loads((tmp_path / "figures.json").read_text())["rows"]
    backend = huggingface.HFLM(
        pretrained=str(export(tmp_path / "a.pt", tmp_path / "hf")), trust_remote_code=True,
        device="cpu", batch_size=4, prefix_token_id=tokenizer.eot or 0)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    theirs = simple_evaluate(backend, tasks=list(kinds), task_manager=manager)["results"]
    for row, (kind, (metric, _)) in zip(ours, kinds.items(), strict=True):
        assert theirs[kind][f"{metric},none"] == pytest.approx(row[metric]), kind
        assert row[metric] > 0


WINDOW = [  # a fork's option: attention sees so many tokens
    ("    attention: str =", "    window: int = 0  # seen tokens\n    attention: str ="),
    ("config.n_head, config.dropout\n",
     "config.n_head, config.dropout\n        self.window = config.window\n"),
    ("cache.extend(k, v)\n", "cache.extend(k, v)\n"
     "        if mask is None:\n"
     "            mask = torch.ones(T, k.size(2), dtype=torch.bool).tril(k.size(2) - T)\n"
     "        mask = mask & (mask.sum(-1, keepdim=True) - mask.cumsum(-1) < self.window)\n")]
IN_THE_FORK = """
import sys, bench, sample, train
out, words = sys.argv[1], sys.argv[2:]
train.main([*words, f"--out_dir={out}/run", "--window=3", "--velocity_init=add", "--bias=False"])
bench.main(["export", f"--ckpt={out}/run", f"--out={out}/first"])
bench.main(["export", f"--ckpt={out}/first", f"--out={out}/hf"])
for source in (f"--out_dir={out}/run", f"--init_from={out}/hf"):
    print("-----")
    sample.main([source, "--start=ab", "--temperature=0", "--num_samples=1", "--device=cpu",
                 "--max_new_tokens=9", "--dtype=float32"])
"""
ANYWHERE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = model.generate(**tokenizer("ab", return_tensors="pt"), max_new_tokens=9, do_sample=False)
print(tokenizer.decode(ids[0]))
"""


def test_a_fork_is_exported(tmp_path, words):
    """With an option of its own, and read where none of our files are to be seen."""
    pytest.importorskip("transformers")
    copy_code(str(tmp_path / "fork"))
    path = tmp_path / "fork" / "model.py"
    code = path.read_text()
    for old, new in WINDOW:
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    path.write_text(code)

    def python(cwd, *words) -> str:
        done = subprocess.run([sys.executable, *map(str, words)], cwd=cwd, text=True,
                              capture_output=True, env=os.environ | {
                                  "PYTHONPATH": "", "HF_MODULES_CACHE": str(tmp_path / "m")})
        assert done.returncode == 0, done.stderr
        return done.stdout

    printed = python(tmp_path / "fork", "-c", IN_THE_FORK, tmp_path, *words(tmp_path / "run"))
    assert "code_that_ran" in printed and f"{tmp_path}/first/model.py" in printed
    texts = [text.strip("\n") for text in printed.split("-----\n")[1:]]
    texts.append(python("/", "-I", "-c", ANYWHERE, tmp_path / "hf").strip("\n"))
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) > 3


@pytest.mark.parametrize("old, new, said", [
    ("self.c_proj(y.", "2 * self.c_proj(y.", "logits"),
    ("k, v, mask = cache.extend(k, v)", "_, _, mask = cache.extend(k, v)", "size of tensor"),
    ("import math\n", "import math\nimport support.errors\n", "No module named 'support'")])
def test_code_that_makes_another_model_is_refused(tmp_path, old, new, said):
    """The model.py that the run's folder keeps, if it is not what we compute."""
    pytest.importorskip("transformers")
    write(tmp_path / "ckpt.pt", template="nesterov")
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    torch.save(checkpoint | {"code": {"hash": "a1"}}, tmp_path / "ckpt.pt")
    kept = tmp_path / "code_that_ran" / "a1" / "model.py"
    kept.parent.mkdir(parents=True)
    code = Path(model_file).read_text()
    assert old in code
    kept.write_text(code.replace(old, new))
    lines = refused(lambda: export(tmp_path, tmp_path / "hf"), said, "--format=safetensors")
    assert len(lines) == 1 and not (tmp_path / "hf").exists()


def test_a_buffer_that_is_not_stored_is_refused(tmp_path):
    """transformers would leave it as the memory happens to be."""
    pytest.importorskip("safetensors")
    model = write(tmp_path / "a.pt")
    model.transformer.register_buffer("slopes", torch.ones(2), persistent=False)
    refused(lambda: exchange.with_code(model, {}, {}, str(tmp_path), tmp_path, ()),
            "transformer.slopes", "persistent=True", "--format=safetensors")


# -----------------------------------------------------------------------------
# safetensors


def test_every_variant_comes_back(tmp_path):
    pytest.importorskip("safetensors")
    more = dict(velocity_init="add", vocab_size=384, vocab_used=257)
    path = tmp_path / "st" / "model.safetensors"
    for options in [*VARIANTS.values(), more]:
        write(tmp_path / "a.pt", **{"bias": False, "n_embd": 16, "n_layer": 1} | options)
        export(tmp_path / "a.pt", tmp_path / "st", "--format=safetensors", "--overwrite")
        there, back = read_checkpoint(str(tmp_path / "a.pt")), read_checkpoint(str(tmp_path / "st"))
        del there["config"]
        assert_same(back, there | {"model": back["model"]})
        assert_same(named_weights(back["model"]), dict(there["model"]))
        model = model_from(back)
        assert model.lm_head.weight is model.transformer.wte.weight
        refused(lambda: read_checkpoint(str(path)), "name the folder")
    size = sum(p.numel() for p in model.parameters()) * 4
    assert size < path.stat().st_size < size + 8000


@pytest.mark.parametrize("form", ["hf", "safetensors"])
def test_the_programs_read_the_folder(tmp_path, words, capsys, form):
    """As they read the .pt file; its name may begin with gpt2."""
    pytest.importorskip("transformers" if form == "hf" else "safetensors")
    write(tmp_path / "a.pt", template="nesterov", ffn="hourglass", bias=False)
    folder = export(tmp_path / "a.pt", tmp_path / "gpt2-mine", f"--format={form}")
    printed = []
    for source in (folder, tmp_path / "a.pt"):
        capsys.readouterr()
        sample.main([f"--init_from={source}", "--start=ab", "--temperature=0", "--num_samples=1",
                     "--max_new_tokens=12", "--device=cpu", "--dtype=float32"])
        text = capsys.readouterr().out
        train.main(words(tmp_path / "out", init_from=source, template="nesterov", ffn="hourglass",
                         ffn_depth=2, eval_only=True))
        losses = [line for line in capsys.readouterr().out.splitlines() if "val loss" in line]
        printed.append((text, losses))
    assert printed[0] == printed[1] and len(text) > 5 and len(losses) == 1


def test_a_nanogpt_checkpoint_gets_its_tokenizer(tmp_path, capsys):
    """Unless it is not known."""
    for vocab_size, tokenizer in (50304, "gpt2"), (65, None):
        write(tmp_path / "a.pt", None, vocab_size=vocab_size, n_embd=4, n_layer=1)
        export(tmp_path / "a.pt", tmp_path / f"{vocab_size}", "--format=safetensors")
        meta = read_checkpoint(str(tmp_path / f"{vocab_size}")).get("tokenizer", {})
        assert meta.get("tokenizer") == tokenizer
    assert "its tokenizer is not known: left out" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# Conversion


def convert(ckpt, out, *words):
    bench.main(["convert", f"--ckpt={ckpt}", f"--out={out}", "--velocity_norm=none", *words])
    return model_from(read_checkpoint(str(out))).double().eval()


def by_hand(gpt: GPT, v: torch.Tensor, splitting: str, mu: float, beta: float) -> torch.Tensor:
    """The GPT's weights in X' = X + h (beta V + gamma h g(X + mu V)), gamma = 1 / h, float64."""
    t, (x,) = gpt.transformer, gpt.embed(IDX, torch.arange(8)[None])
    for block in t.h:
        def attention(z, b=block):
            return b.attn(b.ln_1(z))

        def ffn(z, b=block):
            return b.mlp(b.ln_2(z))

        for oracles, h in {"lie_trotter": [([attention], 1), ([ffn], 1)],
                           "euler": [([attention, ffn], 1)],
                           "strang": [([attention], 0.5), ([ffn], 1), ([attention], 0.5)],
                           }[splitting]:
            v = beta * v + sum(g(x + mu * v) for g in oracles)
            x = x + h * v
    return gpt.lm_head(t.ln_f(x))


@pytest.mark.parametrize("ffn", ["mlp", "swiglu", "hourglass"])
@pytest.mark.parametrize("splitting", ["lie_trotter", "euler", "strang"])
def test_a_converted_gpt_is_the_gpt(tmp_path, ffn, splitting):
    """At -20 to rounding, at -10 nearly, and otherwise the formula, for each template and V_0."""
    gpt = write(tmp_path / "a.pt", ffn=ffn, splitting=splitting, bias=False).double()
    expected = logits(gpt)
    for template, raw, start, range_map in (
            ("polyak", -20, "embed", "sigmoid"), ("nesterov", -20, "embed", "softplus"),
            ("tmm", -20, "zero", "sigmoid"), ("nesterov", -10, "zero", "softplus"),
            ("tmm", -10, "embed", "sigmoid")):
        model = convert(tmp_path / "a.pt", tmp_path / "b.pt", f"--template={template}",
                        f"--raw_init={raw}", f"--velocity_init={start}", "--overwrite",
                        f"--scalar_map={range_map}")
        assert model.config.template == template and model.config.splitting == splitting
        small = 1 / (1 + math.exp(-raw)) if range_map == "sigmoid" else math.log1p(math.exp(raw))
        v = torch.zeros(())
        if start == "embed":
            v = model.transformer.vte(IDX) + model.transformer.vpe(torch.arange(8))
            assert 0.015 < model.transformer.vte.weight.std() < 0.025
        with torch.no_grad():
            formula = by_hand(gpt, v, splitting, 0 if template == "polyak" else small, small)
        # gamma = 1 and nu = 1 are stored in fp32: softplus(log(e - 1)) is 1 to 1e-7
        assert (logits(model) - formula).abs().max() < 3e-5
        difference = (logits(model) - expected).abs().max()
        assert difference < (3e-5 if raw == -20 else 3e-2)
        assert raw == -20 or difference > 1e-5


def test_sub_mlps_as_substeps_are_converted(tmp_path):
    gpt = write(tmp_path / "a.pt", ffn="hourglass", ffn_substeps="each", splitting="strang")
    model = convert(tmp_path / "a.pt", tmp_path / "b.pt", "--template=tmm")
    assert (logits(model) - logits(gpt.double())).abs().max() < 3e-5


@pytest.mark.parametrize("raw", [-20, -10])
def test_it_learns_on(tmp_path, run, raw):
    """From the loss of the GPT; at -10 mu and beta move, at -20 they hardly do."""
    start = run(tmp_path / "a", dataset="easy", max_iters=30, eval_interval=30)[-1]["val_loss"]
    before = convert(tmp_path / "a", tmp_path / "b.pt", "--template=nesterov", f"--raw_init={raw}")
    records = run(tmp_path / "c", init_from=tmp_path / "b.pt", dataset="easy", max_iters=20,
                  eval_interval=20, template="nesterov", velocity_norm="none", learning_rate=3e-3)
    losses = [r["val_loss"] for r in records if r["type"] == "eval"]
    assert losses[0] == pytest.approx(start, abs=1e-3 if raw == -10 else 1e-6)
    assert losses[-1] < 0.8 * losses[0]
    after = model_from(read_checkpoint(str(tmp_path / "c" / "ckpt.pt")))
    scalars = [(p - before.get_parameter(n)).abs().max()
               for n, p in after.parameter_roles()["scalar"].items() if ".gamma" not in n]
    assert (min(scalars) > 1e-3) if raw == -10 else (max(scalars) < 0.2)


# -----------------------------------------------------------------------------
# Mistakes: one line, exit code 2, nothing left behind


@pytest.mark.parametrize("command, said", [
    ("export --out=b", "--ckpt"), ("export --ckpt=a.pt", "--out"),
    ("export --ckpt=none.pt --out=b", "no checkpoint none.pt"),
    ("export --ckpt=empty --out=b", "empty/ckpt.pt"),
    ("export --ckpt=a.pt --out=full", "is there already; choose another --out"),
    ("export --ckpt=a.pt --out=full --overwrite", "is there already"),
    ("export --ckpt=a.pt --out=a.pt --overwrite", "is there already"),
    ("export --ckpt=a.pt --out=a.pt/b", "name another place"),
    ("export --ckpt=a.pt --out=b --format=gguf", "format=gguf"),
    ("CONVERT --template=gd", "template=gd"), ("CONVERT --out=b", "FILE.pt"),
    ("CONVERT --velocity_norm=update", "velocity_norm=update: expected none"),
    ("CONVERT --out=a.pt", "is there already"), ("CONVERT --out=none/b.pt", "none/b.pt"),
    ("CONVERT --raw_init=5", "raw_init=5"), ("CONVERT --n_layer=7", "unknown option n_layer"),
    ("CONVERT --ckpt=v.pt", "template=polyak"), ("CONVERT --ckpt=add.pt", "velocity_init=add")])
def test_mistakes(tmp_path, monkeypatch, command, said):
    command = command.replace("CONVERT", "convert --ckpt=a.pt --out=b.pt --velocity_norm=none")
    monkeypatch.chdir(tmp_path)
    write("a.pt")
    write("v.pt", template="polyak")
    write("add.pt", velocity_init="add")
    os.mkdir("empty")
    os.mkdir("full")
    Path("full", "thesis.txt").write_text("mine")
    before = sorted(os.listdir())
    assert len(refused(lambda: bench.main(command.split()), said)) == 1
    assert sorted(os.listdir()) == before and os.listdir("full") == ["thesis.txt"]


@pytest.mark.parametrize("name, content, said", [
    ("config.json", "{", "cannot load"), ("config.json", "[1]", "cannot load"),
    ("config.json", '{"n_layer": 2}', "ckpt.pt"), ("config.json", None, "cannot load"),
    ("config.json", dict(model_args=[1]), "its model_args is no table"),
    ("config.json", dict(tokenizer=3), "its tokenizer is no table"),
    ("config.json", dict(model_args=dict(n_layer=1, n_embd=8, n_head=2)),
     "do not fit its model_args"),
    ("model.safetensors", None, "may be damaged"), ("model.safetensors", 3000, "may be damaged")])
def test_a_damaged_folder(tmp_path, name, content, said):
    pytest.importorskip("safetensors")
    write(tmp_path / "a.pt", n_layer=1)
    path = export(tmp_path / "a.pt", tmp_path / "st", "--format=safetensors") / name
    if content is None:
        path.unlink()
    elif content == 3000:
        os.truncate(path, content)
    else:
        if isinstance(content, dict):
            content = json.dumps(json.loads(path.read_text()) | content)
        path.write_text(content)
    config = sample.SampleConfig(init_from=str(tmp_path / "st"))
    assert len(refused(lambda: sample.load_model(config), said)) == 1


@pytest.mark.parametrize("missing, argv", [
    ("transformers", ["--format=hf"]), ("safetensors.torch", ["--format=safetensors"])])
def test_a_missing_package(tmp_path, monkeypatch, missing, argv):
    write(tmp_path / "a.pt")
    export(tmp_path / "a.pt", tmp_path / "st", *argv)
    monkeypatch.setitem(sys.modules, missing, None)
    lines = refused(lambda: export(tmp_path / "a.pt", tmp_path / "new", *argv), "pip install")
    lines += refused(lambda: read_checkpoint(str(tmp_path / "st")), "pip install")
    assert len(lines) == 2 and sorted(os.listdir(tmp_path)) == ["a.pt", "st"]


def test_nothing_half_written(tmp_path, monkeypatch):
    """Neither where the disk is full; what was there stays."""
    safetensors = pytest.importorskip("safetensors.torch")
    write(tmp_path / "a.pt")
    export(tmp_path / "a.pt", tmp_path / "st", "--format=safetensors")
    before = (tmp_path / "st" / "model.safetensors").read_bytes()

    def full(_, path, *__):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr(safetensors, "save_file", full)
    for out in ("st", "new"):
        with pytest.raises(UserError, match="No space left"):
            export(tmp_path / "a.pt", tmp_path / out, "--format=safetensors", "--overwrite")
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "st"]
    assert (tmp_path / "st" / "model.safetensors").read_bytes() == before
