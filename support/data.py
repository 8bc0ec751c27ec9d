"""Training data: a file of tokens, read in windows of T + 1."""

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from support.errors import explain_failures, fail


class Tokens:
    """One split of a data folder with this meta. read(starts) gives rows of T + 1 raw ids."""

    def __init__(self, folder: str, split: str, meta: dict, block_size: int):
        self.path = os.path.join(folder, f"{split}.bin")
        self.kind = np.dtype(meta["dtype"]).newbyteorder("<")
        self.tokens = os.path.getsize(self.path) // self.kind.itemsize
        # not mapped: the pages of a mapped file count as memory, and grow with what is read
        self.file = open(self.path, "rb", buffering=0)
        self.block_size, self.vocab_size = block_size, meta["vocab_size"]
        if len(self) <= block_size:
            fail(f"{self.path} has {len(self)} tokens, and a window of block_size={block_size} "
                 f"needs {block_size + 1}; lower --block_size or prepare more text")

    def __len__(self) -> int:
        return self.tokens

    def read(self, starts: Sequence[int]) -> torch.Tensor:
        """(len(starts), T + 1), in the signed type as wide as the bin's: two bytes a token."""
        rows = np.empty((len(starts), self.block_size + 1), self.kind)
        with explain_failures(self.path, mend="mend its disk, or copy the data to another one"):
            for row, start in zip(rows, starts, strict=True):
                self.file.seek(start * self.kind.itemsize)
                if self.file.readinto(row) < row.nbytes:
                    fail(f"{self.path} is shorter than it was; prepare the data again")
        if rows.max() >= self.vocab_size:
            fail(f"{self.path} has the token id {rows.max()}, and its vocabulary only "
                 f"{self.vocab_size}; prepare the data again")
        return torch.from_numpy(rows.view(f"<i{rows.itemsize}"))


def identity(folder: str, meta: dict) -> dict:
    """What tells these training data from others: their number of tokens and sha256, or, of a
    nanoGPT folder, that of the first and the last megabyte."""
    path, digest = os.path.join(folder, "train.bin"), meta["train"].get("sha256")
    if digest is None:
        with explain_failures(path, mend="mend its disk"), open(path, "rb") as file:
            ends = file.read(1 << 20)
            file.seek(max(0, os.path.getsize(path) - (1 << 20)))
            digest = "ends: " + hashlib.sha256(ends + file.read()).hexdigest()
    return {"tokens": meta["train"]["tokens"], "sha256": digest}


def to_device(rows: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw rows (B, T + 1) -> inputs and targets (B, T) int64 on the device."""
    mask = (1 << 8 * rows.element_size()) - 1  # the bins are unsigned
    ids = rows.to(device, non_blocking=device.type == "cuda").long() & mask
    return ids[:, :-1].contiguous(), ids[:, 1:].clone()  # of a single row both would be views


class WindowOrder:
    """The order in which training visits the windows: position p is window p % W of epoch p // W,
    whatever the micro-batch or the number of ranks. An epoch is a seeded permutation of
    W = (N - T) // T non-overlapping windows (one if N < 2T), whose grid starts at token 0 in epoch
    0 and later at a seeded offset, so that every token is read. For OpenWebText an epoch's order
    takes 0.4 s and 71 MB."""

    def __init__(self, n_tokens: int, block_size: int, seed: int):
        self.n_tokens, self.block_size, self.seed = n_tokens, block_size, seed
        self.per_epoch = max(1, (n_tokens - block_size) // block_size)
        self.epoch, self.order = -1, np.zeros(0, dtype=np.int64)  # the latest that was asked for

    def begin(self, epoch: int) -> None:
        """Draw the first tokens of this epoch's windows, (W,)."""
        generator = np.random.RandomState(np.random.MT19937(
            np.random.SeedSequence([self.seed, epoch])))
        windows = generator.permutation(self.per_epoch)
        spare = self.n_tokens - 1 - self.per_epoch * self.block_size  # targets are one further on
        offset = generator.randint(spare + 1) if epoch > 0 else 0
        self.epoch, self.order = epoch, offset + self.block_size * windows

    def starts(self, position: int, count: int) -> list[int]:
        """First tokens of the windows position .. position + count - 1."""
        found: list[int] = []
        while len(found) < count:
            epoch, index = divmod(position + len(found), self.per_epoch)
            if epoch != self.epoch:
                self.begin(epoch)
            found += self.order[index:index + count - len(found)].tolist()
        return found


def evaluation_starts(n_tokens: int, block_size: int, eval_tokens: int) -> list[int]:
    """Evenly spaced windows of the split that hold eval_tokens tokens, or all of them if fewer."""
    windows = (n_tokens - 1) // block_size
    count = min(windows, max(1, eval_tokens // block_size))
    return [i * windows // count * block_size for i in range(count)]


def prefetch(batches: Iterator) -> Iterator:
    """The same items for ever, made four ahead by a thread; its exception is raised here."""
    with ThreadPoolExecutor(1) as pool:
        ready = deque(pool.submit(next, batches) for _ in range(4))
        while True:
            yield ready.popleft().result()
            ready.append(pool.submit(next, batches))
