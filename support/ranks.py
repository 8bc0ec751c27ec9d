"""TODO."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from support.device import pick_device
from support.errors import fail

COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # longer than writing the largest checkpoint


class Ranks:
    """This process among those of torchrun; alone, every collective is a no-op."""

    def __init__(self, config):
        self.parallel = "RANK" in os.environ
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store, self.restarted = None, attempt != "0"  # is it torchrun's restart of this run?
        numbers = {name: os.environ.get(name, default) for name, default in
                   (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))}
        complete = {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() or not self.parallel
        if not (complete and all(n.isdecimal() for n in numbers.values())
                and int(numbers["RANK"]) < int(numbers["WORLD_SIZE"])):
            words = ", ".join(f"{name}={number}" for name, number in numbers.items())
            fail(f"{words} is not what torchrun sets; start with torchrun, or unset them")
        self.rank, local_rank, self.world = map(int, numbers.values())
        self.device = pick_device(config.device, local_rank)
        if config.gradient_accumulation_steps % self.world:
            fail(f"gradient_accumulation_steps={config.gradient_accumulation_steps}: must be a "
                 f"multiple of the {self.world} processes, over all of which it is the total; use "
                 f"--gradient_accumulation_steps={self.world}, and a smaller --batch_size")
        if config.parallel == "fsdp" and not self.parallel:
            fail("parallel=fsdp divides the model over processes, and here is only one; start "
                 "them with torchrun --nproc_per_node=N")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.parallel:
            backend = config.backend or ("nccl" if self.device.type == "cuda" else "gloo")
            if backend == "nccl" and self.device.type != "cuda":
                fail(f"backend=nccl is for CUDA, and this device is {self.device}; use gloo")
            store, _, _ = next(dist.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # it outlives restarts
                self.store, self.restarted = store, store.check(["begun"])
            dist.init_process_group(  # torchrun's restarts leave addresses of the dead in its store
                "cpu:gloo,cuda:nccl" if backend == "nccl" else backend, rank=self.rank,
                world_size=self.world, store=dist.PrefixStore(f"attempt-{attempt}", store),
                timeout=COLLECTIVE_TIMEOUT)

    def begun(self) -> None:
        """From here on torchrun's restarts resume this run. (Not those of one that was refused.)"""
        if self.store is not None:
            self.store.set("begun", "")

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sum over the processes, in place; returns its argument."""
        if self.parallel:
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Does one process say so?"""
        return self.sum(torch.tensor(float(flag))).item() > 0  # over gloo: the GPU need not wait

    def gather(self, value) -> list:
        """Every process's value, in the order of the ranks."""
        if not self.parallel:
            return [value]
        gathered = [None] * self.world
        dist.all_gather_object(gathered, value)
        return gathered

    def close(self) -> None:
        """Leave the process group."""
        if self.parallel:
            dist.destroy_process_group()


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list, for the loop to see. A second signal, a second or more
    after the first (Ctrl-C under torchrun arrives twice), ends the process at once: a thread sees
    to that, because Python's handlers wait for a collective or a write to return."""
    caught: list[int] = []
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        first = None
        while number := reader.recv(1):
            now = time.monotonic()
            if first is not None and now - first > 1:
                os._exit(128 + number[0])
            if first is None:
                first = now
                print("\nstopping after this step; another signal ends it at once",
                      file=sys.stderr, flush=True)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    before = {n: signal.signal(n, lambda number, _: caught.append(number))
              for n in (signal.SIGTERM, signal.SIGINT)}
    signal.set_wakeup_fd(writer.fileno())
    try:
        yield caught
    finally:
        signal.set_wakeup_fd(-1)
        for number, old in before.items():
            signal.signal(number, old)
        writer.close()
        thread.join()
        reader.close()
