"""Models in and out: for transformers, as safetensors; a trained GPT as a momentum model."""

import contextlib
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from model import GPT, KVCache, transposed
from sample import SampleConfig, load_checkpoint, nanogpt_tokenizer
from support.checkpoint import model_from, write_file
from support.code import HERE
from support.errors import UserError, fail
from support.files import write_json
from support.meta import END_OF_TEXT, TOKENIZER_KEYS
from support.tokenizer import Tokenizer
from tools import ToolConfig


@dataclass
class ExportConfig(ToolConfig):
    """Write a model for transformers, or as safetensors."""

    ckpt: str | None = None  # a run's or exported folder, a .pt file, gpt2*
    out: str | None = None  # the folder to write
    format: Literal["hf", "safetensors"] = "hf"  # for transformers, or for us
    overwrite: bool = False  # replace a folder that was exported before
    data_dir: str = "data"  # where a nanoGPT checkpoint's meta.pkl is

    def rules(self, rule: Callable[[bool, str], None]) -> None:
        rule(self.ckpt is not None,
             "say of which model: --ckpt=FOLDER of a run, or --ckpt=FILE.pt")
        rule(self.out is not None, "say where to: --out=FOLDER")


@dataclass
class ConvertConfig(ExportConfig):
    """Make a momentum model of a trained GPT: same logits, to train on."""

    out: str | None = None  # the .pt file to write
    template: Literal["nesterov", "polyak", "tmm"] = "nesterov"  # the momentum model's
    velocity_norm: Literal["none"] = "none"  # N_v would rescale every step, and change the logits
    velocity_init: Literal["embed", "zero"] = "embed"  # how the velocity starts
    scalar_map: Literal["sigmoid", "softplus"] = "sigmoid"  # range of mu and beta: (0, 1), (0, inf)
    raw_init: float = -20.0  # raw mu and beta; -10 learns faster, from less exact logits
    seed: int = 1337  # of the second table

    def rules(self, rule: Callable[[bool, str], None]) -> None:
        super().rules(rule)
        rule((self.out or ".pt").endswith(".pt"), "say where to: --out=FILE.pt")
        rule(self.raw_init <= -4,
             f"raw_init={self.raw_init}: mu and beta begin near 0, so that the logits stay; choose "
             f"from -20 (exact) to -4")


def checkpoint_named(ckpt: str, data_dir: str = "data") -> SampleConfig:
    """--ckpt as sample.py has it: the out_dir of a run, or what init_from can be."""
    a_run = any(os.path.isfile(os.path.join(ckpt, name)) for name in ("ckpt.pt", "best.pt"))
    return SampleConfig(data_dir=data_dir, **{"out_dir" if a_run else "init_from": ckpt})


def load_source(config: ExportConfig) -> tuple[GPT, dict, dict]:
    """The model that --ckpt names, on the CPU, what a checkpoint says of its tokenizer (nothing
    where that is not known), and the checkpoint."""
    checkpoint = load_checkpoint(checkpoint_named(config.ckpt, config.data_dir))
    meta = checkpoint.get("tokenizer") or {}
    with contextlib.suppress(UserError):
        meta = meta or nanogpt_tokenizer(checkpoint, config.data_dir)
    meta = {k: meta[k] for k in TOKENIZER_KEYS if meta.get(k)}
    return model_from(checkpoint).eval(), meta, checkpoint


@contextlib.contextmanager
def new_folder(path: str, overwrite: bool) -> Iterator[str]:
    """A folder to fill, which then gets its name: it is whole, or not there. Only an exported
    folder is overwritten."""
    path = os.path.abspath(path)
    exported = os.path.isfile(os.path.join(path, "model.safetensors"))
    empty = os.path.isdir(path) and not os.listdir(path)
    if os.path.lexists(path) and not empty and not (overwrite and exported):
        fail(f"{path} is there already; choose another --out, or --overwrite an exported folder")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path), prefix=".partial-") as folder:
        os.mkdir(f"{folder}/new")
        yield f"{folder}/new"
        if exported:
            os.rename(path, f"{folder}/old")
        os.rename(f"{folder}/new", path)


def export(config: ExportConfig) -> None:
    """Write a model to a folder."""
    model, meta, checkpoint = load_source(config)
    with new_folder(config.out, config.overwrite) as folder:
        try:
            if config.format == "safetensors":
                note = to_safetensors(model, meta, folder)
            else:
                note = to_hf(model, meta, folder, code_of(checkpoint, config.ckpt),
                             checkpoint["model_args"])
        except ImportError:
            fail(f"--format={config.format} needs a package: pip install transformers safetensors")
        weights = os.path.join(folder, "model.safetensors")
        shutil.copymode(os.path.join(folder, "config.json"), weights)  # safetensors' is 0600
    print(f"{config.out}: {model.get_num_params(False):,} parameters\n{note}")


def about(model: GPT, meta: dict) -> dict:
    """What a checkpoint of ours says beside its weights."""
    return {"model_args": asdict(model.config)} | ({"tokenizer": meta} if meta else {})


def to_safetensors(model: GPT, meta: dict, folder: str) -> str:
    """The weights as they are, the tied ones once; model_args and tokenizer in config.json."""
    from safetensors.torch import save_file

    weights = {n: w.contiguous() for n, w in model.state_dict().items()}
    if model.lm_head.weight is model.transformer.wte.weight:
        del weights["lm_head.weight"]
    save_file(weights, os.path.join(folder, "model.safetensors"), {"format": "pt"})
    write_json(os.path.join(folder, "config.json"), about(model, meta))
    return f"tokenizer {meta['tokenizer']}" if meta else "its tokenizer is not known: left out"


def code_of(checkpoint: dict, ckpt: str) -> Path:
    """The model.py that made this checkpoint, where a folder keeps it; else the present one."""
    folder = Path(ckpt if os.path.isdir(ckpt) else os.path.dirname(ckpt))
    made_it = checkpoint.get("code", {}).get("hash", "")
    kept = [folder / "code_that_ran" / made_it / "model.py",  # of a run
            Path(ckpt) / "model.py"]  # of an exported folder
    return next((path for path in kept if path.is_file()), HERE / "model.py")


def to_hf(model: GPT, meta: dict, folder: str, code: Path = HERE / "model.py",
          known: Iterable[str] = ()) -> str:
    """For transformers: a plain GPT as its GPT-2, any other model with its own code (model.py,
    which has the options `known`). The folder's logits are ours, or it is refused."""
    m, stored = model.config, model.lm_head.weight.dtype
    eot = Tokenizer.from_meta(meta).eot if meta else None
    ends = {"bos_token_id": eot, "eos_token_id": eot}
    gpt2 = as_gpt2(model.to(torch.promote_types(stored, torch.float32)), meta, ends)
    if gpt2 is not None:
        gpt2.to(stored).save_pretrained(folder, max_shard_size="1TB")
        kind = "as transformers' GPT2LMHeadModel"
    else:
        with_code(model.to(stored), meta, ends, folder, code, known)
        largest, change = compare_logits(model.double(), lambda idx: loaded_logits(folder, idx))
        if not change < 1e-4 * largest:
            fail(f"with {code} transformers does not compute this model: on random tokens the "
                 f"logits, of up to {largest:.3g}, would change by up to {change:.1e}; use "
                 f"--format=safetensors")
        kind = f"with its own code, {code}: load it with trust_remote_code=True"
    padding = list(range(m.vocab_used or m.vocab_size, m.vocab_size))
    if padding:  # stays, so that the logits are the same, and is never drawn
        ends["suppress_tokens"] = padding
    write_json(os.path.join(folder, "generation_config.json"), ends)
    return f"{kind}; {save_tokenizer(meta, m.block_size, folder)}"


def as_gpt2(model: GPT, meta: dict, ends: dict):
    """The same as a GPT-2 of transformers, with zeros for biases that it does not have; None where
    GPT-2 has other weights or other logits."""
    from transformers import GPT2Config, GPT2LMHeadModel

    m = model.config
    if m.d_attn != m.n_embd:
        return None
    config = GPT2Config(
        vocab_size=m.vocab_size, n_positions=m.block_size, n_embd=m.n_embd, n_layer=m.n_layer,
        n_head=m.n_head, n_inner=m.ffn_hidden, resid_pdrop=m.dropout, embd_pdrop=m.dropout,
        attn_pdrop=m.dropout, activation_function="gelu" if m.activation == "gelu" else "gelu_new",
        tokenizer=meta or None, **ends)  # the tokenizer is for us alone
    with torch.device("meta"):
        shapes = {name: w.shape for name, w in GPT2LMHeadModel(config).state_dict().items()}
    ours = transposed(model.state_dict())
    if any(shapes.get(name) != w.shape for name, w in ours.items()):
        return None
    gpt2 = GPT2LMHeadModel(config).to(model.lm_head.weight.dtype).eval()
    theirs = gpt2.state_dict()
    gpt2.load_state_dict({n: ours.get(n, torch.zeros_like(w)) for n, w in theirs.items()})
    largest, change = compare_logits(model, lambda idx: gpt2(idx).logits)
    return gpt2 if change < 1e-4 * largest else None


def with_code(model: GPT, meta: dict, ends: dict, folder: str, code: Path, known: Iterable[str],
              ) -> None:
    """The weights as they are, the code that computes with them, and what transformers asks for."""
    to_safetensors(model, meta, folder)
    if lost := {n for n, _ in model.named_buffers()} - model.state_dict().keys():
        fail(f"transformers loses {sorted(lost)[0]}, a buffer that is not stored: use "
             f"--format=safetensors; in later runs register it with persistent=True")
    own = Path(__file__).with_name("modeling_nanoyurii.py")
    shutil.copyfile(own, os.path.join(folder, own.name))
    shutil.copyfile(code, os.path.join(folder, "model.py"))
    m, cache = model.config, KVCache()
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long), cache=cache)
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    args = {k: v for k, v in asdict(m).items() if k in known or k == "vocab_used"}
    write_json(os.path.join(folder, "config.json"), about(model, meta) | ends | {
        "model_type": "nanoyurii", "architectures": ["NanoYuriiForCausalLM"], "model_args": args,
        "auto_map": {"AutoConfig": f"{own.stem}.NanoYuriiConfig",
                     "AutoModelForCausalLM": f"{own.stem}.NanoYuriiForCausalLM"},
        "vocab_size": m.vocab_size, "max_position_embeddings": m.block_size,
        "hidden_size": m.n_embd, "num_attention_heads": m.n_head, "tie_word_embeddings": True,
        "num_hidden_layers": len(cache.slots),  # as many as attention is called: for the cache
        "dtype": dtype, "torch_dtype": dtype})


ELSEWHERE = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("new", trust_remote_code=True).double().eval()
idx = torch.load("idx.pt")
half = (idx.size(1) + 1) // 2
with torch.no_grad():
    whole = model(idx).logits
    begun = model(idx[:, :half], use_cache=True)
    rest = model(idx[:, half:], past_key_values=begun.past_key_values).logits
torch.save(torch.stack((whole, torch.cat((begun.logits, rest), dim=1))), "logits.pt")
"""


def loaded_logits(folder: str, idx: torch.Tensor) -> torch.Tensor:
    """What transformers computes from this folder for idx (B, T), at once and in two parts with a
    cache, (2, B, T, V): in a process that does not see our files."""
    place = os.path.dirname(folder)
    torch.save(idx, os.path.join(place, "idx.pt"))
    modules = os.path.join(place, "modules")  # transformers copies the code there
    paths = [modules, *(path for path in sys.path if os.path.realpath(path) != str(HERE))]
    result = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], cwd=place, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_MODULES_CACHE": modules,
                          "HF_HUB_OFFLINE": "1"})
    if result.returncode:
        said = (result.stderr.strip() or f"exit code {result.returncode}").splitlines()[-1]
        fail(f"transformers cannot compute with this model's code: {said}; use "
             f"--format=safetensors")
    return torch.load(os.path.join(place, "logits.pt"), weights_only=True)


def save_tokenizer(meta: dict, block_size: int, folder: str) -> str:
    """The tokenizer as transformers', in tokenizer.json, where it has that form. Says which."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Table

    name = meta.get("tokenizer", "unknown")
    ours = Tokenizer.from_meta(meta) if name in ("bytes", "char", "gpt2", "r50k_base") else None
    if ours is None or len(ours.ids) < len(ours.alphabet):
        return f"without its tokenizer ({name}), which has no such form"
    pattern = Regex(ours.bpe._pat_str if ours.bpe else r"[\s\S]")
    steps = [pre_tokenizers.Split(pattern, "isolated")]
    if name == "char":
        table = Table(models.WordLevel(ours.ids))
        table.decoder = decoders.Fuse()
    else:
        ranks = ours.bpe._mergeable_ranks if ours.bpe else {bytes([i]): i for i in range(256)}
        table = Table(models.BPE(*vocabulary(ranks), ignore_merges=True))
        table.decoder = decoders.ByteLevel()
        table.add_special_tokens([END_OF_TEXT])
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    table.pre_tokenizer = pre_tokenizers.Sequence(steps)
    table.save(os.path.join(folder, "tokenizer.json"), pretty=False)
    special = {} if ours.eot is None else dict.fromkeys(
        ("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    write_json(os.path.join(folder, "tokenizer_config.json"), special | {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False})
    return f"with its tokenizer ({name})"


def vocabulary(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The ids of tiktoken's tokens, written as GPT-2's files write bytes, and the merges: each way
    in which two tokens make another."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters, merges = bytes_to_unicode(), []
    names = {token: "".join(letters[byte] for byte in token) for token in ranks}
    for token in sorted(ranks, key=ranks.get):
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        halves = [(a, b) for a, b in halves if a in ranks and b in ranks]
        merges += [(names[a], names[b]) for a, b in sorted(halves, key=lambda pair: ranks[pair[0]])]
    return {names[token]: rank for token, rank in ranks.items()}, merges


@torch.no_grad()
def compare_logits(model: GPT, other: Callable) -> tuple[float, float]:
    """On one batch of random tokens: the model's largest logit, and how far the other's are off."""
    c = model.config
    idx = torch.randint(c.vocab_used or c.vocab_size, (1, c.block_size))
    logits = model(idx, idx)[0]
    return logits.abs().max().item(), (logits - other(idx)).abs().max().item()


def convert(config: ConvertConfig) -> None:
    """A trained GPT as a momentum model, to train on: with velocity_norm=none, gamma = nu = 1 (in
    Strang's halves gamma h = 1) and mu, beta -> 0, X' = X + h nu (beta V + gamma h g(X + mu V)) is
    X + h g(X). Prints how far the logits are from the GPT's."""
    if os.path.lexists(config.out) and not (config.overwrite and os.path.isfile(config.out)):
        fail(f"{config.out} is there already; choose another --out, or --overwrite a file")
    old, meta, _ = load_source(config)
    if old.config.template != "gd" or old.config.velocity_init == "add":
        fail(f"{config.ckpt} has template={old.config.template}, velocity_init="
             f"{old.config.velocity_init}: only template=gd without second tables is converted")
    torch.manual_seed(config.seed)
    new = GPT(replace(old.config, template=config.template,
                      velocity_norm=config.velocity_norm, velocity_init=config.velocity_init,
                      scalar_map=config.scalar_map))
    new.to(old.lm_head.weight.dtype).load_state_dict(old.state_dict(), strict=False)
    with torch.no_grad():
        for block in new.transformer.h:
            for step, (_, h) in zip(block.steps, block.split(*block.oracles()), strict=True):
                step.gamma.fill_(math.log(math.expm1(1 / h)))
                for name in {"mu", "beta"} & step.learned.keys():
                    getattr(step, name).fill_(config.raw_init)
    largest, change = compare_logits(old, lambda idx: new.eval()(idx, idx)[0])
    write_file({"model": new.state_dict()} | about(new, meta), config.out)
    tokenizer = f"the {meta['tokenizer']} tokenizer's" if meta else "its"
    print(f"{config.out}: {config.template}, {new.get_num_params(False):,} parameters\n"
          f"on random tokens the logits, of up to {largest:.3g}, changed by up to {change:.1e}\n"
          f"train on: python train.py --init_from={config.out} --dataset=NAME, with {tokenizer} "
          f"data and the options of a run")
