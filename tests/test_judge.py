"""bench.py eval: a checkpoint on tasks, item by item as lm-evaluation-harness's own `hf` backend
has it, and on text, as train.py has it.

What needs lm-eval, transformers, or GPT-2's vocabulary and the sample texts in ../shared/data is
skipped where these are missing.
"""

import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED, refused, write_data
from variants import write_checkpoint

import bench
import tools.judge
from model import GPT, GPTConfig
from support.checkpoint import model_from
from support.tokenizer import Tokenizer
from tools import exchange

ROOT = Path(__file__).resolve().parents[1]
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="no copies of the data sets")
CHARS = {"tokenizer": "char", "alphabet": "\n abcdé", "vocab_size": 7, "padded_vocab_size": 7}
T = 16  # of write_checkpoint's model


def judge(tmp_path, *argv) -> list[dict]:
    """The rows of a command."""
    bench.main(["eval", "--device=cpu", *map(str, argv), f"--json={tmp_path}/figures.json"])
    return json.loads((tmp_path / "figures.json").read_text())["rows"]


# -----------------------------------------------------------------------------
# Text


def nats_one_by_one(model: GPT, ids: list[int], stop: int) -> float:
    """The sum over ids[1:stop + 1], in float64, one prediction at a time."""
    model, total = model.double().eval(), 0.0
    with torch.no_grad():
        for i in range(1, stop + 1):
            logits = model(torch.tensor([ids[(i - 1) // T * T:i]]))[0][0, 0]
            total += (logits.exp().sum().log() - logits[ids[i]]).item()
    return total


def test_text(tmp_path):
    """Nats, perplexity and bits per byte of characters, of which one has two bytes."""
    write_checkpoint(tmp_path / "run" / "ckpt.pt", CHARS)
    text = "abc dé\n" * 11  # 4 whole windows and 12 characters more
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    (row,) = judge(tmp_path, f"--ckpt={tmp_path}/run", f"--data={tmp_path}/text.txt")
    model = model_from(torch.load(tmp_path / "run" / "ckpt.pt"))
    ids = [CHARS["alphabet"].index(character) for character in text]
    total = nats_one_by_one(model, ids, len(ids) - 1)
    assert row["tokens"] == len(text) - 1 == 76
    assert row["nats"] == pytest.approx(total / 76, rel=1e-6)
    assert row["perplexity"] == pytest.approx(math.exp(total / 76), rel=1e-5)
    assert row["bits_per_byte"] == pytest.approx(total / math.log(2) / (76 + 11), rel=1e-6)


def test_documents(tmp_path):
    """The end of a text has bits, but no bytes; records are documents, as for prepare.py."""
    write_checkpoint(tmp_path / "ckpt.pt")
    (tmp_path / "text.txt").write_bytes("é one\n<|endoftext|>\ntwo".encode())
    (tmp_path / "text.jsonl").write_text('{"text": "é one"}\n{"text": "two"}\n')
    row, records = (judge(tmp_path, f"--ckpt={tmp_path}/ckpt.pt", f"--data={tmp_path}/{name}")[0]
                    for name in ("text.txt", "text.jsonl"))
    ids = [*"é one".encode(), 256, *b"two", 256]
    total = nats_one_by_one(model_from(torch.load(tmp_path / "ckpt.pt")), ids, 10)
    assert row["tokens"] == 10 and row["nats"] == pytest.approx(total / 10, rel=1e-6)
    assert row["bits_per_byte"] == pytest.approx(total / math.log(2) / (5 + 3), rel=1e-6)
    assert records["bits_per_byte"] == row["bits_per_byte"]
    (tmp_path / "text.jsonl").write_text('{"body": "é one"}\n{"body": "two"}\n')
    words = f"--ckpt={tmp_path}/ckpt.pt", f"--data={tmp_path}/text.jsonl"
    refused(lambda: judge(tmp_path, *words), "--field chooses one of: body")
    assert judge(tmp_path, *words, "--field=body")[0]["nats"] == records["nats"]


def test_ids_without_their_text_have_no_bits_per_byte(tmp_path):
    """Null, from nanoGPT's tables with gaps: what they print as is no text."""
    table = {**CHARS, "alphabet": [f"<{i}>" for i in range(len(CHARS["alphabet"]))]}
    write_checkpoint(tmp_path / "ckpt.pt", table)
    write_data(tmp_path / "data" / "gaps", [1, 2, 3] * 20, **table)
    (row,) = judge(tmp_path, f"--ckpt={tmp_path}/ckpt.pt", "--data=gaps",
                   f"--data_dir={tmp_path}/data")
    assert row["bits_per_byte"] is None and row["nats"] > 0


@pytest.mark.parametrize("eval_tokens", [10**6, 64])
def test_a_folder_has_the_loss_of_train(run, data_dir, tmp_path, capsys, eval_tokens):
    """Also of a model that is not a GPT, and of a part of the split."""
    log = run(tmp_path / "run", template="nesterov", max_iters=4, eval_interval=4,
              eval_tokens=eval_tokens)
    (row,) = judge(tmp_path, f"--ckpt={tmp_path}/run", "--data=tiny", f"--data_dir={data_dir}",
                   f"--eval_tokens={eval_tokens}")
    assert row["nats"] == pytest.approx(log[-1]["val_loss"], rel=1e-6)
    assert row["tokens"] == min(299 // T * T, eval_tokens)


# -----------------------------------------------------------------------------
# Scores


def tiny(seed=0, **options) -> GPT:
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**dict(block_size=T, vocab_size=300, n_layer=2, n_head=2, n_embd=32,
                                 vocab_used=257) | options)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.2)
    return model


def some_pairs(n=30) -> list[tuple[list[int], list[int]]]:
    """Contexts of 1 to 29 ids, continuations of none to 29; some differ in the last id only."""
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(257, size=1 + i % 29).tolist(), rng.integers(257, size=i).tolist())
             for i in range(n)]
    return pairs + [(pairs[5][0], [i]) for i in range(4)]


def one_by_one(model: GPT, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    whole, total, greedy = context + continuation, 0.0, True
    for i, target in enumerate(continuation):
        end = len(context) + min(i // T * T + T, len(continuation))  # of its piece
        seen = whole[max(0, end - T - 1):len(context) + i]
        logits = model(torch.tensor([seen]))[0][0, 0, :257]
        total += logits.log_softmax(-1)[target].item()
        greedy &= logits.argmax().item() == target
    return total, greedy


VARIANTS = [dict(), dict(template="nesterov"), dict(template="tmm", position="rope"),
            dict(ffn="hourglass", norm="rmsnorm", bias=False)]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@torch.no_grad()
def test_scores(options, monkeypatch):
    """Of every variant, and of a fork's logits: one by one, and in batches of any size; not of the
    padding's rows."""
    monkeypatch.setattr(GPT, "logits", lambda self, x: 9 * (self.lm_head(x) / 9).tanh())
    model, pairs = tiny(**options).double(), some_pairs()
    greedy = model.generate(torch.tensor([[3, 5]]), 9, temperature=0)[0].tolist()
    pairs += [(greedy[:2], greedy[2:]), ([7], [])]
    expected = [one_by_one(model, *pair) for pair in pairs]
    assert expected[-2][1] and expected[-1] == (0.0, True)
    model.transformer.wte.weight[257:] = 1e3
    for batch_size in (1, 7, 100):
        assert np.allclose(tools.judge.score(model, pairs, batch_size), expected, atol=1e-10)


def test_completions():
    """Up to the stop, in a batch of several lengths; the draws are seeded."""
    model, tokenizer = tiny().double(), Tokenizer("bytes")
    prompts = [list(b"one"), list(b"a prompt"), list(b"x")]

    def complete(prompts, seed=0, until=(), do_sample=False, **how):
        how |= dict(max_gen_toks=30, until=until, do_sample=do_sample)
        return tools.judge.complete(model, tokenizer, prompts, how, seed, range(len(prompts)))

    alone = [complete([p])[0] for p in prompts]
    assert complete(prompts) == alone
    for prompt, text in zip(prompts, alone, strict=True):
        ids = model.generate(torch.tensor([prompt]), 30, temperature=0)[0, len(prompt):].tolist()
        assert tokenizer.decode(ids).startswith(text)
        assert len(text) == len(tokenizer.decode(ids)) or 256 in ids
    stop = alone[1][4:6]
    assert complete(prompts, until=["", stop]) == [text.split(stop)[0] for text in alone]
    drawn = [complete(prompts, seed, do_sample=True) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert complete(prompts, do_sample=True, top_k=0, top_p=0) == drawn[0]  # 0 is none


# -----------------------------------------------------------------------------
# lm-evaluation-harness


class Request:
    def __init__(self, *args):
        self.args = args


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory):
    """(our model, our tokenizer, the harness's hf backend) with the same weights."""
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    if not SHARED.is_dir():
        pytest.skip("no copy of GPT-2's vocabulary")
    folder = tmp_path_factory.mktemp("gpt2")
    shutil.copytree(SHARED / "tiktoken_cache", folder / "cache", copy_function=shutil.copyfile)
    model = tiny(block_size=128, vocab_size=50257, vocab_used=None, n_embd=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder / "cache"))
        tokenizer = Tokenizer("gpt2")
        exchange.to_hf(model, {"tokenizer": "gpt2"}, str(folder))
    backend = huggingface.HFLM(
        pretrained=transformers.AutoModelForCausalLM.from_pretrained(folder), device="cpu",
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder), batch_size=4)
    return model, tokenizer, backend


def ours(gpt2, batch_size=8):
    config = tools.judge.EvalConfig("x", "x", batch_size=batch_size)
    return tools.judge.harness_model(*gpt2[:2], config)


LONG = "It was the best of times, it was the worst of times. " * 20
PAIRS = [("", " the end"), ("", "<|endoftext|> one"), ("Once upon", " a time"),
         ("Once upon ", "a time"), ("One\n\n", "  two"), (LONG, " the age of wisdom"),
         ("The", LONG[:300]), ("Question: what?\nAnswer:", " A"),
         ("Question: what?\nAnswer:", " B"), ("a<|endoftext|>b", " c<|endoftext|>"),
         ("naïve 🙂", " déjà vu 👩‍👩‍👧")]


def test_loglikelihood_is_that_of_the_hf_backend(gpt2):
    requests = [Request(*pair) for pair in PAIRS]
    backend = gpt2[2]
    greedy = backend.generate_until([Request("Once upon", {"max_gen_toks": 5, "until": []})])
    requests.append(Request("Once upon", greedy[0]))
    theirs = backend.loglikelihood(requests, disable_tqdm=True)
    for batch_size in (1, 8):
        found = ours(gpt2, batch_size).loglikelihood(requests)
        assert np.allclose(found, theirs, rtol=1e-5, atol=1e-4)
    assert theirs[-1][1]
    texts = [Request(text) for text in ("", "One.", LONG, LONG[:600] + "<|endoftext|>" + LONG)]
    theirs = backend.loglikelihood_rolling(texts, disable_tqdm=True)
    assert np.allclose(ours(gpt2).loglikelihood_rolling(texts), theirs, rtol=1e-5)


def test_generation_is_that_of_the_hf_backend(gpt2):
    short, long = {"until": ["\n\n"], "max_gen_toks": 24}, {"until": [], "max_gen_toks": 60}
    requests = [Request(context, how) for how in (short, long)
                for context in ("Once upon", "The", LONG, "One,<|endoftext|>two", "naïve 🙂")]
    theirs = gpt2[2].generate_until(requests, disable_tqdm=True)
    assert ours(gpt2).generate_until(requests) == theirs
    stop = theirs[5][3:6]
    requests = [Request(r.args[0], {"until": stop, "max_gen_toks": 60}) for r in requests[5:]]
    found = ours(gpt2).generate_until(requests)
    assert found == gpt2[2].generate_until(requests, disable_tqdm=True)
    assert found[0] == theirs[5].split(stop)[0]
    # more tokens than the model's context has, which the hf backend refuses
    how = {"until": [], "max_gen_toks": 140, "do_sample": True, "temperature": 0.7, "top_k": 5}
    assert all(ours(gpt2).generate_until([Request(LONG, how), Request("", how)]))


SAMPLED = {"until": [], "max_gen_toks": 20, "do_sample": True, "temperature": 1.5}


def harness(batch_size=12):
    pytest.importorskip("lm_eval")
    config = tools.judge.EvalConfig("x", "x", batch_size=batch_size)
    return tools.judge.harness_model(tiny(), Tokenizer("bytes"), config)


def test_repeats_differ_and_do_not_depend_on_the_batch():
    requests = [Request(context, SAMPLED) for context in ("one", "a longer one") for _ in range(3)]
    texts = [harness(batch_size).generate_until(requests) for batch_size in (1, 2, 6)]
    assert texts[0] == texts[1] == texts[2] and len(set(texts[0])) == 6


def test_what_a_task_asks_in_vain():
    """Is refused by name, and what asks for nothing is not."""
    plain = Request("one", SAMPLED | {"num_beams": 1, "repetition_penalty": 1.0})
    assert harness().generate_until([plain])
    for name, value in (("repetition_penalty", 1.2), ("num_beams", 4), ("stop_strings", ["a"])):
        asking = [plain, Request("one", SAMPLED | {name: value})]
        refused(lambda asking=asking: harness().generate_until(asking), f"{name}={value}")


def test_an_answer_without_a_token_is_refused(gpt2):
    """As by the hf backend, where one token spans the context and the answer."""
    request = Request("Once upon a ti", "me")
    assert gpt2[1].encode("Once upon a time")[:-1] == gpt2[1].encode("Once upon a")
    with pytest.raises(AssertionError):
        gpt2[2].loglikelihood([Request("a ti", "me")], disable_tqdm=True)
    refused(lambda: ours(gpt2).loglikelihood([request]), "'me'", "target_delimiter")


def test_a_character_model(tmp_path):
    """Its texts begin after a newline, for want of an end of text."""
    pytest.importorskip("lm_eval")
    model, tokenizer = tiny(vocab_size=7, vocab_used=7), Tokenizer("char", CHARS["alphabet"])
    config = tools.judge.EvalConfig("x", "x")
    judged = tools.judge.harness_model(model, tokenizer, config)
    assert np.allclose(judged.loglikelihood([Request("", "abc"), Request(" ", "d")]),
                       tools.judge.score(model, [([0], [2, 3, 4]), ([0], [1, 5])], 2))
    refused(lambda: judged.loglikelihood([Request("", "xyz")]), "'xyz'")
    bare = tools.judge.harness_model(model, Tokenizer("char", "abc"), config)
    refused(lambda: bare.loglikelihood([Request("", "abc")]), "alphabet")


COPY = dict(output_type="generate_until", doc_to_text="{{text}}", doc_to_target="{{text}}",
            generation_kwargs={"until": ["q"], "max_gen_toks": 8},
            metric_list=[{"metric": "exact_match"}])


def write_task(folder, name, splits, **options):
    """local_NAME: a task with these splits, of which each has a file of the folder."""
    files = {split: f"{folder}/{file}.jsonl" for split, file in splits.items()}
    task = dict.fromkeys(("dataset_name", "training_split", "test_split"))
    task |= {f"{split}_split": split for split in splits}
    task |= dict(task=f"local_{name}", dataset_path="json",
                 dataset_kwargs={"data_files": files, "cache_dir": f"{folder}/cache"})
    (folder / f"{name}.yaml").write_text(json.dumps(task | options))


@pytest.fixture
def local_tasks(tmp_path, monkeypatch):
    """The harness's own HellaSwag and ARC-Easy on local copies of their items."""
    lm_eval = pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def write(name, records):
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in records))

    def read(name):
        return [json.loads(line) for line in (SHARED / name).read_text().splitlines()]

    write("hellaswag.jsonl", [
        {"activity_label": r["activity_label"], "ctx_a": r["ctx"], "ctx_b": "",
         "endings": r["endings"], "label": str(r["label"])}
        for r in read("hellaswag/validation.jsonl")[:60]])
    for split in ("train", "validation"):
        write(f"{split}.jsonl", [
            {"question": r["question"], "answerKey": "ABCDE"[r["gold"]],
             "choices": {"text": r["choices"], "label": list("ABCDE")[:len(r["choices"])]}}
            for r in read(f"arc_easy/{split}.jsonl")[:60]])
    write("copy.jsonl", [{"text": "one"}, {"text": "two"}])
    harness = f"{Path(lm_eval.__file__).parent}/tasks"
    write_task(tmp_path, "hellaswag", {"validation": "hellaswag"},
               include=f"{harness}/hellaswag/hellaswag.yaml")
    write_task(tmp_path, "arc", {"training": "train", "validation": "validation"},
               include=f"{harness}/arc/arc_easy.yaml")
    write_task(tmp_path, "copy", {"test": "copy"}, **COPY)
    (tmp_path / "group.yaml").write_text(json.dumps(dict(
        group="local_group", task=["local_hellaswag", "local_arc"],
        aggregate_metric_list=[{"metric": "acc"}])))
    return tmp_path


@needs_data
def test_tasks_are_those_of_the_hf_backend(gpt2, local_tasks, monkeypatch):
    """HellaSwag 0-shot and ARC-Easy with an example, 10 items each: the figures, every item."""
    import lm_eval

    monkeypatch.setattr(tools.judge, "load_model", lambda c: gpt2[:2])
    simple_evaluate, both = lm_eval.simple_evaluate, []

    def watched(model, log_samples, **how):
        both.append([simple_evaluate(m, **how) for m in (model, gpt2[2])])
        return both[-1][0]

    monkeypatch.setattr(lm_eval, "simple_evaluate", watched, raising=False)
    names, shots = ["local_hellaswag", "local_arc"], [0, 1]
    rows = judge(local_tasks, "--ckpt=gpt2", f"--tasks={','.join(names)}", "--num_fewshot=0,1",
                 "--limit=10", f"--include_path={local_tasks}", "--batch_size=16")
    for row, name, n, (own, theirs) in zip(rows, names, shots, both, strict=True):
        figures = theirs["results"][name]
        assert (row["variant"], row["shots"], row["items"]) == (name, n, 10)
        for key in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"):
            assert row[key] == pytest.approx(figures[f"{key},none"])
        for a, b in zip(own["samples"][name], theirs["samples"][name], strict=True):
            assert a["arguments"] == b["arguments"] and a["acc"] == b["acc"]
            assert np.allclose([r[0][0] for r in a["resps"]], [r[0][0] for r in b["resps"]],
                               rtol=1e-5, atol=1e-4)
    text = own["samples"]["local_arc"][0]["arguments"][0][0]
    assert text.count("Question:") == 2


@needs_data
def test_a_checkpoint_on_tasks(local_tasks, capsys):
    """From a run's folder; texts beyond its 16 tokens; a task's own metric; a group of tasks."""
    write_checkpoint(local_tasks / "run" / "ckpt.pt")
    rows = judge(local_tasks, f"--ckpt={local_tasks}/run", "--tasks=local_group, local_copy,",
                 "--limit=3", f"--include_path={local_tasks}")
    rows = {row["variant"]: row for row in rows}
    a, b, copy = (rows[f"local_{name}"] for name in ("hellaswag", "arc", "copy"))
    assert [row["items"] for row in (a, b, copy)] == [3, 3, 2] and a["shots"] == 0
    assert rows["local_group"]["acc"] == pytest.approx((a["acc"] + b["acc"]) / 2)
    assert copy["exact_match"] == 0.0 and 0 <= a["acc_norm"] <= 1
    printed = capsys.readouterr().out
    refused(lambda: judge(local_tasks, f"--ckpt={local_tasks}/run", "--tasks=local_arc",
                          "--num_fewshot=61", f"--include_path={local_tasks}"), "local_arc")
    assert all(word in printed for word in ("local_hellaswag", "acc_norm_stderr", "exact_match"))


def test_the_task_in_the_docs(tmp_path, monkeypatch):
    """Its YAML and the line of JSON beside it are a task."""
    pytest.importorskip("lm_eval")
    page = (ROOT / "docs/evaluation.md").read_text()
    text = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    Path("tasks").mkdir()
    Path("tasks/endings.yaml").write_text(text)
    Path("endings.jsonl").write_text((re.search(r"# (\{.*\})", text)[1] + "\n") * 3)
    write_checkpoint(tmp_path / "ckpt.pt")
    (row,) = judge(tmp_path, f"--ckpt={tmp_path}/ckpt.pt", "--tasks=endings",
                   "--include_path=tasks")
    assert row["items"] == 3 and row["acc"] in (0.0, 1.0) and "acc_norm" in row


# -----------------------------------------------------------------------------
# Mistakes


@needs_data
def test_logits_that_are_not_finite(tmp_path, local_tasks):
    write_checkpoint(tmp_path / "ckpt.pt")
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    checkpoint["model"]["transformer.ln_f.weight"] *= 1e5
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    for words in ([f"--data={tmp_path}/copy.jsonl"], ["--tasks=local_hellaswag", "--limit=1"],
                  ["--tasks=local_copy"]):
        words = [f"--ckpt={tmp_path}/ckpt.pt", f"--include_path={tmp_path}", *words]
        refused(lambda w=words: judge(tmp_path, *w, "--dtype=float16"), "--dtype=float32")
        assert judge(tmp_path, *words, "--dtype=float32")


@pytest.mark.parametrize("words, said", [
    ("--data=tiny", ["--ckpt", "--tasks", "--data"]), ("CKPT", ["--tasks", "--data"]),
    ("CKPT --data=tiny --tasks=hellaswag", ["either"]),
    ("CKPT --data=tiny --limit=0", ["limit=0"]), ("--ckpt=none.pt --data=tiny", ["none.pt"]),
    ("CKPT --data=none.txt", ["none.txt", "text file"]),
    ("CKPT --data=text.txt", ["UTF-8", "byte 4"]), ("CKPT --data=empty.txt", ["0 tokens"]),
    ("CKPT --data=tiny --data_dir=DATA_DIR",
     ["tokenizer, bytes,", "char", "--tokenizer=CHECKPOINT.pt"]),
    ("CKPT --data=more", ["id 7"]), ("CKPT --tasks=hellaswag", ["pip install lm-eval"])])
def test_mistakes(tmp_path, data_dir, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "ckpt.pt", CHARS)
    (tmp_path / "text.txt").write_bytes(b"abc \xff")
    (tmp_path / "empty.txt").write_text("\n")
    write_data(tmp_path / "data" / "more", np.arange(340) % 8, vocab_size=7, tokenizer="char",
               alphabet=CHARS["alphabet"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    words = words.replace("CKPT", "--ckpt=ckpt.pt").replace("DATA_DIR", str(data_dir))
    assert len(refused(lambda: judge(tmp_path, *words.split()), *said)) == 1


def test_mistaken_tasks(tmp_path, monkeypatch):
    tasks = pytest.importorskip("lm_eval.tasks")
    real, some = tasks.TaskManager, Path(tasks.__file__).parent / "hellaswag"
    monkeypatch.setattr(tasks, "TaskManager", lambda include_path, **_: real(  # all take 10 seconds
        include_path=include_path or str(some), include_defaults=False))
    write_checkpoint(tmp_path / "ckpt.pt", CHARS)
    write_task(tmp_path, "copy", {"test": "copy"}, **COPY)

    def line(*words, said):
        argv = [f"--ckpt={tmp_path}/ckpt.pt", *words]
        assert len(refused(lambda: judge(tmp_path, *argv), *said)) == 1

    line("--tasks=a,b", "--num_fewshot=1,2,3", said=["num_fewshot=1,2,3", "2 tasks"])
    line("--tasks=a", "--num_fewshot=-1", said=["num_fewshot=-1"])
    line("--tasks=local_copy", f"--include_path={tmp_path}", said=["local_copy", "copy.jsonl"])
    line("--tasks=hellasvag", said=["no task hellasvag", "hellaswag"])
