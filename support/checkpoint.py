"""TODO."""

import contextlib
import itertools
import json
import os
import pickle
import shutil
import sys
import textwrap
import warnings
from dataclasses import asdict, fields, replace

import torch
import torch.distributed as dist

from model import GPT, GPTConfig
from support.errors import UserError, fail, printable, reason
from support.files import rename, sync_folder
from support.ranks import Ranks

# All that torch.distributed.checkpoint names in its metadata, beside the dtypes. (Not
# BytesStorageMetadata: objects, which it would unpickle.)
SHARD_CLASSES = {
    "torch": {"Size"}, "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "WindowsPath"}, "pathlib._local": {"PosixPath", "WindowsPath"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "_MEM_FORMAT_ENCODING", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata"}}


class ShardMetadata(pickle.Unpickler):
    """The metadata of shards is a pickle, which could run code: this one names nothing else."""

    def find_class(self, module: str, name: str):
        a_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if a_dtype or name in SHARD_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def shard_reader(folder: str):
    """torch.distributed.checkpoint's reader of a folder that `parallel=fsdp` wrote. Raises OSError
    or ValueError where a file is missing or too short."""
    from torch.distributed.checkpoint import FileSystemReader  # which takes long to import

    class Reader(FileSystemReader):
        def read_metadata(self, *_, **__):
            with open(os.path.join(folder, ".metadata"), "rb") as file:
                metadata = ShardMetadata(file).load()
            for part in metadata.storage_data.values():
                path = os.path.join(folder, os.path.basename(part.relative_path))
                if os.path.getsize(path) < part.offset + part.length:
                    raise ValueError(f"{path} is too short")
            return metadata

    return Reader(folder)


def read_shards(folder: str, kind: str) -> dict[str, torch.Tensor]:
    """The whole tensors of shards whose names begin with kind/, on the CPU."""
    import torch.distributed.checkpoint as dcp

    reader = shard_reader(folder)
    there = reader.read_metadata().state_dict_metadata.items()
    tensors = {name: torch.empty(t.size, dtype=t.properties.dtype) for name, t in there
               if name.startswith(f"{kind}/")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is a single process: so it should be
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return {name.removeprefix(f"{kind}/"): tensor for name, tensor in tensors.items()}
def read_pretrained(name: str, **override_args) -> GPT:
    """A GPT-2 of the Hugging Face Hub, or a folder that transformers saved. UserError where it
    cannot be loaded, or computes something that ours does not."""
    try:
        return GPT.from_pretrained(name, override_args)
    except ImportError:
        fail("GPT-2 weights need transformers: pip install transformers")
    except Exception as error:  # a damaged file raises nearly anything
        fail(f"cannot load {name}: {reason(error)}")


def model_from(checkpoint: dict, **changes) -> GPT:
    """The model of a checkpoint, ours or nanoGPT's; changes: config values to replace. UserError
    where the weights do not fit."""
    model = GPT(replace(checkpoint_config(checkpoint), **changes))
    weights = {k.removeprefix("_orig_mod."): w for k, w in checkpoint["model"].items()}
    masks = [k for k in weights if k.endswith(".attn.bias")]  # older nanoGPT's causal masks
    try:
        model.to(weights["lm_head.weight"].dtype)
        model.load_state_dict({k: w for k, w in weights.items() if k not in masks})
    except (KeyError, RuntimeError) as error:  # torch lists all that is missing or misshapen
        what = textwrap.shorten(str(error), 300)
        fail(f"the checkpoint's weights do not fit its model_args: {what}")
    return model


def read_folder(folder: str) -> dict:
    """A checkpoint from a folder: bench.py export's model.safetensors and config.json, or a GPT-2
    that transformers saved."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
        kind = "ours" if "model_args" in config else config.get("model_type")
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        kind = None
    if kind == "gpt2":
        model = read_pretrained(folder)
        return {"model": model.state_dict(), "model_args": asdict(model.config)}
    if kind != "ours":
        fail(f"{folder} holds no model of bench.py export, and no GPT-2 of transformers; of a run "
             f"name the file: {os.path.join(folder, 'ckpt.pt')}")
    try:
        from safetensors.torch import load_file
    except ImportError:
        fail(f"{folder} needs safetensors: pip install safetensors")
    try:
        table = load_file(os.path.join(folder, "model.safetensors"))
        table["lm_head.weight"] = table["transformer.wte.weight"]  # tied
    except Exception as error:  # a damaged file raises nearly anything
        fail(f"{folder} is damaged: its model.safetensors: {reason(error)}")
    return {k: config[k] for k in ("model_args", "tokenizer") if k in config} | {"model": table}
CHECKPOINT_TYPES = {  # of what a checkpoint may have; nanoGPT's best_val_loss is a tensor
    "model_args": dict, "config": dict, "optimizer": dict,
    "scaler": dict, "shards": str, "rng": list, "iter_num": int, "tokens_seen": int, "skipped": int,
    "best_val_loss": (int, float, torch.Tensor), "log_length": (int, type(None)),
    "evaluated": (int, type(None)), "tokenizer": (dict, type(None))}


def read_checkpoint(path: str, weights: bool = True) -> dict:
    """A checkpoint file, or a folder (see read_folder), on the CPU; tensors and plain Python only.
    UserError if it cannot be read. Where its tensors are in shards, its weights are read from
    there, unless weights=False."""
    if not os.path.exists(path):
        fail(f"no checkpoint {path}; train one, or name the right folder")
    try:
        checkpoint = read_folder(path) if os.path.isdir(path) else torch.load(
            path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError:
        fail(f"{path} is damaged or no checkpoint, or it holds more than tensors and plain Python, "
             f"which could run code: it was not loaded")
    except Exception as error:  # a damaged file raises nearly anything
        fail(f"{path} is damaged or no checkpoint: {reason(error)}")
    if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= checkpoint.keys():
        fail(f"{path} holds no model; expected nanoGPT's keys model and model_args")
    for name, kinds in CHECKPOINT_TYPES.items():
        value = checkpoint.get(name)
        if (name in checkpoint and not isinstance(value, kinds)) or (
                isinstance(value, int) and not 0 <= value < 2**63):
            fail(f"{path} is damaged: it has {name}={printable(value)[:60]}")
    table = checkpoint["model"]
    if not (isinstance(table, dict) and (table or "shards" in checkpoint) and all(
            isinstance(name, str) and isinstance(w, torch.Tensor) and w.is_floating_point()
            for name, w in table.items())):
        fail(f"{path} is damaged: its model is no table of weights")
    if "shards" in checkpoint:
        from torch.distributed.checkpoint import CheckpointException  # no kind of Exception

        folder = os.path.join(os.path.dirname(path), os.path.basename(checkpoint["shards"]))
        try:
            shard_reader(folder).read_metadata()
            if weights:
                table = checkpoint["model"] = read_shards(folder, "model")
                table["lm_head.weight"] = table["transformer.wte.weight"]  # tied
        except (Exception, CheckpointException) as error:
            fail(f"{path} is damaged: its {folder}: {reason(error)}")
    return checkpoint


def read_latest(out_dir: str, weights: bool = True) -> dict | None:
    """The newest whole checkpoint of a run; None if there is none. A damaged one is named."""
    problems = []
    for name in ("ckpt.pt", "ckpt_prev.pt"):
        path = os.path.join(out_dir, name)
        if os.path.exists(path):
            try:
                checkpoint = read_checkpoint(path, weights)
                if problems:
                    print(f"warning: {problems[0]}; using {path}", file=sys.stderr)
                return checkpoint
            except UserError as error:
                problems.append(str(error))
    best = os.path.join(out_dir, "best.pt")  # alone until the first save that is due
    if problems:
        also = f"; perhaps {best} is whole: --init_from={best}" if os.path.exists(best) else ""
        fail(*problems[:-1], problems[-1] + also)
    return read_checkpoint(best, weights) if os.path.exists(best) else None


def checkpoint_config(checkpoint: dict) -> GPTConfig:
    """The architecture of a checkpoint, ours or nanoGPT's."""
    args = checkpoint["model_args"].copy()
    if unknown := sorted(map(str, set(args) - {f.name for f in fields(GPTConfig)})):
        fail(f"the checkpoint's model has options that this version does not know: {unknown}")
    if args.get("vocab_size") == 50304:
        args.setdefault("vocab_used", 50257)  # nanoGPT's padded GPT-2 vocabulary
    try:
        return GPTConfig(**args)
    except ValueError as error:
        fail(*(f"the checkpoint's model has {line}" for line in str(error).splitlines()))


def holds_weights(folder: str) -> bool:
    """Whether bench.py export or transformers may have written this folder."""
    names = os.listdir(folder) if os.path.isdir(folder) else ()
    return any(name.startswith(("model.safetensors", "pytorch_model")) for name in names)


def named_states(optimizers: dict[str, torch.optim.Optimizer]) -> dict:
    """optimiser -> parameter name -> its state."""
    return {kind: {name: o.state[p] for g in o.param_groups
                   for name, p in zip(g["param_names"], g["params"], strict=True) if p in o.state}
            for kind, o in optimizers.items()}


def load_states(optimizers: dict[str, torch.optim.Optimizer], states: dict) -> None:
    """The inverse of named_states; cuts the state of a position table that was cropped, and keeps
    of a sharded parameter's this process's part."""
    def fit(value: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        if not isinstance(value, torch.Tensor) or not value.dim() or hasattr(value, "to_local"):
            return value
        value = value[:len(p)]
        if hasattr(p, "to_local") and value.shape == p.shape:  # a DTensor
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
        return value

    for kind, o in optimizers.items():
        plan = o.state_dict()  # numbers the parameters in the order of the groups
        named = {n: p for g in o.param_groups
                 for n, p in zip(g["param_names"], g["params"], strict=True)}
        numbers = [i for g in plan["param_groups"] for i in g["params"]]
        for i, (n, p) in zip(numbers, named.items(), strict=True):
            if n in states[kind]:
                fitted = {k: fit(v, p) for k, v in states[kind][n].items()}
                if bad := [k for k, v in fitted.items() if not isinstance(v, torch.Tensor)
                           or (v.dim() and v.shape != p.shape)]:
                    fail(f"the checkpoint's {kind} state {bad[0]} of {n} does not fit its "
                         f"parameter; start from the weights alone: --init_from=FILE.pt and "
                         f"another --out_dir")
                plan["state"][i] = fitted
        o.load_state_dict(plan)


def nanogpt_states(model: GPT, state: dict) -> dict:
    """nanoGPT's optimiser state, numbered in its order (matrices and tables, then the rest), by
    name."""
    named = list(model.named_parameters())
    names = [n for n, p in named if p.dim() >= 2] + [n for n, p in named if p.dim() < 2]
    return {"adamw": {names[i]: s for i, s in state["state"].items()}}


def write_file(state: dict, path: str) -> None:
    """Write a checkpoint so that `path` is the old or the new one, whole, at every moment."""
    partial = f"{path}.partial"
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        rename(partial, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            os.remove(partial)
        full = "" if isinstance(error, OSError) else "the disk is full, it seems: "
        fail(f"cannot write {path}: {full}{reason(error)}; ckpt.pt and the others of before are "
             f"intact")


def link(source: str, target: str) -> None:
    """Give the file `source` a second name in one step, replacing what `target` named before."""
    if os.path.exists(target) and os.path.samefile(source, target):
        return  # for which POSIX renames nothing, and leaves the partial name
    with contextlib.suppress(OSError):
        os.remove(f"{target}.partial")
    try:
        os.link(source, f"{target}.partial")
        rename(f"{target}.partial", target)
    except OSError:  # a file system without hard links
        write_file(read_checkpoint(source, weights=False), target)
CHECKPOINTS = ("ckpt.pt", "ckpt_prev.pt", "best.pt")


def save_checkpoint(state: dict, out_dir: str, latest: bool, best: bool) -> None:
    """ckpt.pt, keeping the one before as ckpt_prev.pt, and best.pt, which may be the same file."""
    path, best_path = os.path.join(out_dir, "ckpt.pt"), os.path.join(out_dir, "best.pt")
    if best:  # first: a run killed in between comes here again
        write_file(state, best_path)
    if latest:
        if os.path.exists(path):
            link(path, os.path.join(out_dir, "ckpt_prev.pt"))
        if best:
            link(best_path, path)
        else:
            write_file(state, path)


def tensors_by_name(model: GPT, optimizers: dict[str, torch.optim.Optimizer]) -> dict:
    """model/parameter and optimiser/parameter/state -> tensor, or this process's part of it."""
    weights = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    return weights | {f"{kind}/{name}/{key}": value for kind, of in named_states(optimizers).items()
                      for name, state in of.items() for key, value in state.items()}


def save_shards(tensors: dict[str, torch.Tensor], out_dir: str, step: int, ranks: "Ranks") -> str:
    """Every process writes its parts to a new folder of out_dir, whose name is returned: it counts
    once a checkpoint has that name."""
    import torch.distributed.checkpoint as dcp

    names = (f"shards-{step}" + (f"-{i}" if i else "") for i in itertools.count())
    name = ranks.gather(next(n for n in names if not os.path.exists(os.path.join(out_dir, n))))[0]
    folder = os.path.join(out_dir, name)
    try:
        dcp.save(tensors, checkpoint_id=folder)
    except dcp.CheckpointException as error:
        shutil.rmtree(folder, ignore_errors=True)
        fail(f"cannot write {folder}: {reason(error)}; what was there before is intact")
    sync_folder(folder)
    return name


def load_shards(folder: str, model: GPT) -> dict:
    """Fill the model, however many processes wrote the shards and whether it is sharded now or not;
    return the optimisers' states, as named_states has them, in tensors like the parameters."""
    import torch.distributed.checkpoint as dcp

    reader = shard_reader(folder)
    there = reader.read_metadata().state_dict_metadata
    tensors = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    if sorted(tensors) != sorted(name for name in there if name.startswith("model/")) or any(
            there[name].size != p.shape for name, p in tensors.items()):
        fail(f"{folder} has another model's weights; drop the options that change the model")
    states: dict = {}
    for full_name in sorted(there.keys() - tensors.keys()):
        kind, name, key = full_name.split("/")
        p, shape = tensors[f"model/{name}"], there[full_name].size
        value = torch.zeros_like(p) if shape == p.shape else torch.zeros(shape)
        tensors[full_name] = value
        states.setdefault(kind, {}).setdefault(name, {})[key] = value
    try:
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except dcp.CheckpointException as error:
        fail(f"{folder} is damaged: {reason(error)}; remove the checkpoint that needs it")
    return states


def remove_remains(out_dir: str) -> None:
    """What killed saves have left: partial files, and shards that no checkpoint names."""
    for name in os.listdir(out_dir):
        if name.endswith(".pt.partial"):
            os.remove(os.path.join(out_dir, name))
    old = {name for name in os.listdir(out_dir) if name.startswith("shards-")}
    for name in CHECKPOINTS if old else ():
        with contextlib.suppress(UserError):
            old.discard(read_checkpoint(os.path.join(out_dir, name), weights=False).get("shards"))
    for name in old:
        shutil.rmtree(os.path.join(out_dir, name), ignore_errors=True)


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """torch's generators of this process."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states["device"] = getattr(torch, device.type).get_rng_state()
    return states


def set_rng_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """The inverse of rng_state."""
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu" and "device" in states:
        getattr(torch, device.type).set_rng_state(states["device"])
