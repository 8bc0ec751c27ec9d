"""Models in and out: for transformers, as safetensors; a trained GPT as a momentum model."""

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

import torch

from config import check_rules
from model import GPT, transposed
from sample import SampleConfig, load_checkpoint, nanogpt_tokenizer
from support.checkpoint import model_from, write_file
from support.errors import UserError, fail
from support.files import write_json
from support.meta import END_OF_TEXT, TOKENIZER_KEYS
from support.tokenizer import Tokenizer


@dataclass
class ExportConfig:
    """Write a model for transformers (a plain GPT), or as safetensors (any model)."""

    ckpt: str | None = None  # a run's or exported folder, a .pt file, gpt2*
    out: str | None = None  # the folder to write
    format: Literal["hf", "safetensors"] = "hf"  # for transformers, or for us
    overwrite: bool = False  # replace a folder that was exported before
    data_dir: str = "data"  # where a nanoGPT checkpoint's meta.pkl is

    def __post_init__(self) -> None:
        check_rules(self)

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


# the options that GPT-2 has too, or that do nothing without others
EXPORTED = {"block_size", "vocab_size", "vocab_used", "n_layer", "n_head", "n_embd", "dropout",
            "bias", "ffn_hidden", "activation", "head_dim", "rope_theta", "ffn_depth",
            "ffn_substeps", "imex_steps", "velocity_init", "velocity_norm", "mu_init", "beta_init",
            "gamma_init", "scalar_map", "residual_init_scale"}


def load_source(config: ExportConfig) -> tuple[GPT, dict]:
    """The model that --ckpt names, on the CPU, and what a checkpoint says of its tokenizer: nothing
    where that is not known."""
    checkpoint = load_checkpoint(checkpoint_named(config.ckpt, config.data_dir))
    meta = checkpoint.get("tokenizer") or {}
    if not meta:
        with contextlib.suppress(UserError):
            meta = nanogpt_tokenizer(checkpoint, config.data_dir)
    return model_from(checkpoint).eval(), {k: meta[k] for k in TOKENIZER_KEYS if meta.get(k)}


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
    model, meta = load_source(config)
    write = to_hf if config.format == "hf" else to_safetensors
    with new_folder(config.out, config.overwrite) as folder:
        try:
            note = write(model, meta, folder)
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

    weights = {n: w.contiguous() for n, w in model.state_dict().items() if n != "lm_head.weight"}
    save_file(weights, os.path.join(folder, "model.safetensors"), {"format": "pt"})
    write_json(os.path.join(folder, "config.json"), about(model, meta))
    return f"tokenizer {meta['tokenizer']}" if meta else "its tokenizer is not known: left out"


def to_hf(model: GPT, meta: dict, folder: str) -> str:
    """A plain GPT as a GPT-2 of transformers; biases that it does not have are zeros."""
    from transformers import GPT2Config, GPT2LMHeadModel

    m = model.config
    options = [f"{f.name}={getattr(m, f.name)}" for f in fields(m)
               if f.name not in EXPORTED and getattr(m, f.name) != f.default]
    if options:
        fail(f"transformers' GPT-2 has no {', '.join(options)}; use --format=safetensors")
    eot = Tokenizer.from_meta(meta).eot if meta else None
    hf = GPT2LMHeadModel(GPT2Config(
        vocab_size=m.vocab_size, n_positions=m.block_size, n_embd=m.n_embd, n_layer=m.n_layer,
        n_head=m.n_head, n_inner=m.ffn_hidden, resid_pdrop=m.dropout, embd_pdrop=m.dropout,
        attn_pdrop=m.dropout, bos_token_id=eot, eos_token_id=eot,
        activation_function="gelu" if m.activation == "gelu" else "gelu_new",
        tokenizer=meta or None)).eval()  # which is for us alone
    stored = model.lm_head.weight.dtype
    wide = torch.promote_types(stored, torch.float32)
    ours = transposed(model.to(wide).state_dict())
    weights = {n: ours.get(n, torch.zeros_like(w)) for n, w in hf.to(wide).state_dict().items()}
    try:
        hf.load_state_dict(weights)
    except RuntimeError as error:  # other shapes
        fail(f"transformers' GPT-2 has other weights ({str(error).splitlines()[-1].strip()}); use "
             f"--format=safetensors")
    largest, change = compare_logits(model, lambda idx: hf(idx).logits)
    if not change < 1e-4 * largest:
        fail(f"transformers' GPT-2 is not this model: on random tokens the logits, of up to "
             f"{largest:.3g}, would change by up to {change:.1e}; use --format=safetensors")
    hf.to(stored)
    padding = range(m.vocab_used or m.vocab_size, m.vocab_size)
    if padding:  # stays, so that the logits are the same, and is never drawn
        hf.generation_config.suppress_tokens = list(padding)
    hf.save_pretrained(folder, max_shard_size="1TB")
    name = meta.get("tokenizer", "unknown")
    if name in ("gpt2", "r50k_base"):
        save_tokenizer(name, m.block_size, folder)
        return "with its tokenizer, GPT-2's"
    return f"without its tokenizer ({name}): only GPT-2's is exported; for sample.py use " \
           f"--format=safetensors"


def save_tokenizer(name: str, block_size: int, folder: str) -> None:
    """A tokenizer of tiktoken's in the form of transformers, by its own converter."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    bpe = Tokenizer(name).bpe
    converter = TikTokenConverter(pattern=bpe._pat_str, extra_special_tokens=[END_OF_TEXT])
    converter.load_tiktoken_bpe = lambda _: bpe._mergeable_ranks  # instead of reading a file
    PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(), model_max_length=block_size, bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT, unk_token=END_OF_TEXT).save_pretrained(folder)


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
    old, meta = load_source(config)
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
