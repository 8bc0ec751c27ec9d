"""The processes of a run: torchrun's ranks, what goes between them, signals, the output folder."""

import contextlib
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from support.device import pick_device
from support.errors import UserError, fail
from support.files import locked


class Ranks:
    """This process among those of torchrun; alone, every collective is a no-op."""

    def __init__(self, config: Any):
        """config: TrainConfig; of it device, backend and parallel."""
        self.parallel = "RANK" in os.environ
        self.rank, local_rank, self.world = 0, 0, 1
        if self.parallel:
            names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
            numbers = [os.environ.get(name, "") for name in names]
            if not all(map(str.isdecimal, numbers)) or "MASTER_ADDR" not in os.environ:
                fail("RANK is set, but not LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as "
                     "torchrun sets them; start with torchrun, or unset RANK")
            self.rank, local_rank, self.world, _ = map(int, numbers)
        self.device = pick_device(config.device, local_rank)
        if config.parallel == "fsdp" and not self.parallel:
            fail("parallel=fsdp divides the model over processes, and here is only one; start "
                 "them with torchrun --nproc_per_node=N")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.parallel:
            self.join(config.backend or ("nccl" if self.device.type == "cuda" else "gloo"))

    def join(self, backend: str) -> None:
        """Meet the other processes."""
        if backend == "nccl" and self.device.type != "cuda":
            fail(f"backend=nccl is for CUDA, and this device is {self.device}; use gloo")
        timeout = timedelta(minutes=10)
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # it has addresses of the dead
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if backend == "nccl" else backend, rank=self.rank,
            world_size=self.world, store=store, timeout=timeout)
        # for what waits for files to be read or written
        self.patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))

    def check_accumulation(self, batch_size: int, steps: int) -> None:
        """UserError where the ranks do not divide the micro-batches of a step."""
        if steps % self.world == 0:
            return
        sequences = batch_size * steps
        problem = (f"gradient_accumulation_steps={steps}: must be a multiple of the {self.world} "
                   f"processes, over all of which it is the total")
        for size in range(batch_size, 0, -1):
            if sequences % (size * self.world) == 0:
                fail(f"{problem}; for as many tokens a step use --batch_size={size} "
                     f"--gradient_accumulation_steps={sequences // size}")
        counts = [n for n in range(1, sequences + 1) if sequences % n == 0]
        nearest = [max(n for n in counts if n < self.world), *(n for n in counts if n > self.world)]
        fail(f"{problem}; a step has {sequences} sequences, which is no multiple of {self.world}: "
             f"use {' or '.join(map(str, nearest[:2]))} processes, or other sizes")

    def first(self, function: Callable[[], Any], shared: Callable[[Any], Any] = lambda x: x) -> Any:
        """function() of rank 0 alone; the others get shared(its result), or its UserError."""
        if not self.parallel:
            return function()
        result, message = None, [None]
        try:
            if self.rank == 0:
                result = function()
                message = [shared(result)]
        except UserError as error:
            message = [error]
        dist.broadcast_object_list(message, group=self.patient, device=torch.device("cpu"))
        if isinstance(message[0], UserError):
            raise message[0]
        return result if self.rank == 0 else message[0]

    def share(self, model: torch.nn.Module) -> None:
        """Give every process what rank 0 has of all that a checkpoint holds."""
        if self.parallel:
            for x in dict.fromkeys(model.state_dict(keep_vars=True).values()):
                dist.broadcast(x.data, src=0)

    def average_gradients(self, model: torch.nn.Module) -> None:
        """The mean of the gradients over the processes; 0 where one has none and another has."""
        if self.parallel:
            used = torch.tensor([float(p.grad is not None) for p in model.parameters()])
            for p, n in zip(model.parameters(), self.sum(used).tolist(), strict=True):
                if n > 0 and p.grad is None:
                    p.grad = torch.zeros_like(p)
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
                work.wait()
            torch._foreach_div_(gradients, self.world)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sum over the processes, in place; returns its argument."""
        if self.parallel:
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Does one process say so?"""
        return self.sum(torch.tensor(float(flag))).item() > 0  # over gloo: the GPU need not wait

    def gather(self, value: Any) -> list:
        """Every process's value, in the order of the ranks."""
        values = [value] * self.world
        if self.parallel:
            dist.all_gather_object(values, value)
        return values

    def check_same(self, value: Any, message: str) -> None:
        """UserError(message) on every process where they do not have the same value."""
        if any(other != value for other in self.gather(value)):
            fail(message)

    def whole(self, x: Any) -> Any:
        """A sharded tensor whole, on rank 0's CPU (a collective); other values as they are."""
        if not hasattr(x, "full_tensor"):
            return x
        full = x.full_tensor()
        return full.cpu() if self.rank == 0 else None

    def close(self) -> None:
        """Leave the process group."""
        if self.parallel:
            dist.destroy_process_group()


def shard(model: torch.nn.Module, ranks: Ranks) -> None:
    """Divide the model over the processes, block by block (FSDP2), in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for part in (*dict.fromkeys(model.transformer.h), model):
        fully_shard(part, mesh=mesh)


def part_of(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor where `like` is sharded: Ranks.whole's inverse."""
    if not hasattr(like, "full_tensor"):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements,
                             src_data_rank=None)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM, SIGINT, SIGHUP (unless it was ignored: nohup), SIGUSR1 and 2 (a cluster's)
    for the loop to see; as SIGTERM also that the reader of standard output has left. A second
    signal, a second or more after the first (Ctrl-C under torchrun arrives twice), ends the process
    at once: a thread does that, as Python's handlers wait for a collective or a write to return."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # signals come to that alone
        yield caught
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        if reader.recv(1):
            first = time.monotonic()
            print("\nstopping after this step; another signal ends it at once", file=sys.stderr)
        while number := reader.recv(1):
            if time.monotonic() - first > 1:
                os._exit(128 + number[0])

    def output_failed(error: OSError) -> None:
        print(f"standard output: {error.strerror}; stopping after this step", file=sys.stderr)
        caught.append(signal.SIGTERM)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    sys.stdout.failed = output_failed  # errors.Stream's, to the end of the program
    numbers = [getattr(signal, f"SIG{n}", None) for n in ("TERM", "INT", "HUP", "USR1", "USR2")]
    before = {n: signal.signal(n, lambda number, _: caught.append(number))
              for n in numbers if n and signal.getsignal(n) != signal.SIG_IGN}
    waked = signal.set_wakeup_fd(writer.fileno())
    try:
        yield caught
    finally:
        signal.set_wakeup_fd(waked)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()
        thread.join()
        reader.close()


@contextlib.contextmanager
def locked_folder(path: str, use: bool) -> Iterator[None]:
    """Hold the output folder of a run, if this process is to `use` it; a new one goes if the run
    could not start."""
    if not use:
        yield
        return
    new = not os.path.exists(path)
    try:
        with locked(path, f"another run is writing to {path}; stop it or choose another --out_dir"):
            yield
    finally:
        if new and os.path.isdir(path) and os.listdir(path) in ([], [".lock"]):
            shutil.rmtree(path)
