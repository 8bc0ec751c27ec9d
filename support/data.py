"""TODO."""

import contextlib
import math
import os
import queue
import threading
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from support.errors import fail
from support.files import sha256


class Tokens:
    """One split of a data folder with this meta. read(starts) gives rows of T + 1 raw ids."""

    def __init__(self, folder: str, split: str, meta: dict, block_size: int):
        self.path, kind = os.path.join(folder, f"{split}.bin"), np.dtype(meta["dtype"])
        empty = os.path.getsize(self.path) < kind.itemsize  # which memmap refuses
        self.data = np.zeros(0) if empty else np.memmap(self.path, kind.newbyteorder("<"), mode="r")
        self.block_size, self.vocab_size = block_size, meta["vocab_size"]
        if len(self) <= block_size:
            fail(f"{self.path} has {len(self)} tokens, and a window of block_size={block_size} "
                 f"needs {block_size + 1}; lower --block_size or prepare more text")

    def __len__(self) -> int:
        return len(self.data)

    def read(self, starts: Iterable[int]) -> torch.Tensor:
        """(len(starts), T + 1), in the signed type as wide as the bin's: two bytes a token."""
        rows = np.stack([self.data[s:s + self.block_size + 1] for s in starts])
        if rows.max() >= self.vocab_size:
            fail(f"{self.path} has the token id {rows.max()}, and its vocabulary only "
                 f"{self.vocab_size}; prepare the data again")
        return torch.from_numpy(rows.view(f"<i{rows.itemsize}"))


def check_bins(folder: str, meta: dict) -> None:
    """Compare the bins with what meta.json says of them. Raises UserError if they differ."""
    for split in ("train", "val"):
        path = os.path.join(folder, f"{split}.bin")
        if "sha256" not in meta[split]:
            fail(f"check_data=True: {folder} has no meta.json with the sha256 of its bins; drop "
                 f"the option, or make the data with prepare.py")
        if sha256(path) != meta[split]["sha256"]:
            fail(f"{path} is not what prepare.py wrote: its sha256 differs from meta.json's; "
                 f"prepare the data again, with --overwrite")


def to_device(rows: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw rows (B, T + 1) -> inputs and targets (B, T) int64 on the device."""
    mask = (1 << 8 * rows.element_size()) - 1  # the bins are unsigned
    ids = rows.to(device, non_blocking=device.type == "cuda").long() & mask
    return ids[:, :-1].contiguous(), ids[:, 1:].clone()  # of a single row both would be views


def mix(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """A hash of uint64 (splitmix64's)."""
    x = x + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permuted(x: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """A keyed permutation of range(n), entry by entry, so that none need be stored: a Feistel
    network on the cells of a rectangle; who lands on a cell beyond n goes through it again."""
    columns = np.uint64(math.isqrt(n - 1) + 1)
    rows = np.uint64(-(-n // int(columns)))
    row, column = np.divmod(x.astype(np.uint64), columns)
    for key in keys.reshape(-1, 2):
        row = (row + mix(column, key[0])) % rows
        column = (column + mix(row, key[1])) % columns
    x = row * columns + column
    beyond = x >= n
    if beyond.any():
        x[beyond] = permuted(x[beyond], n, keys)
    return x


class WindowOrder:
    """The order in which training visits the windows, as arithmetic on one integer.

    An epoch is a seeded permutation of W = (N - T) // T non-overlapping windows (one if N < 2T);
    their grid starts at 0 in epoch 0 and at a seeded offset in [0, T) later. Position p is window
    p % W of epoch p // W, whatever the micro-batch or the number of ranks.
    """

    def __init__(self, n_tokens: int, block_size: int, seed: int):
        self.n_tokens, self.block_size, self.seed = n_tokens, block_size, seed
        self.per_epoch = max(1, (n_tokens - block_size) // block_size)

    def starts(self, position: int, count: int) -> list[int]:
        """First tokens of the windows position .. position + count - 1."""
        found: list[int] = []
        while count > 0:
            epoch, index = divmod(position, self.per_epoch)
            here = min(count, self.per_epoch - index)
            keys = np.random.SeedSequence([self.seed, epoch]).generate_state(9, np.uint64)
            room = min(self.block_size, self.n_tokens - self.block_size)
            offset = int(keys[8]) % room if epoch else 0
            windows = permuted(np.arange(index, index + here), self.per_epoch, keys[:8])
            found += (offset + self.block_size * windows.astype(np.int64)).tolist()
            position, count = position + here, count - here
        return found


def evaluation_starts(n_tokens: int, block_size: int, eval_tokens: int) -> list[int]:
    """Evenly spaced windows of the split that hold eval_tokens tokens, or all of them if fewer."""
    there = (n_tokens - 1) // block_size
    count = min(there, max(1, eval_tokens // block_size))
    return [i * there // count * block_size for i in range(count)]


def prefetch(batches: Iterator, depth: int = 4) -> Iterator:
    """The same items, made `depth` ahead by a thread; its exception is raised here."""
    ready: queue.Queue = queue.Queue(depth)
    closed = threading.Event()

    def put(item) -> bool:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return True
        return False

    def work() -> None:
        try:
            for batch in batches:
                if not put((batch, None)):
                    return
        except Exception as error:
            put((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            batch, error = ready.get()
            if error is not None:
                raise error
            yield batch
    finally:
        closed.set()
        thread.join()  # a thread inside torch would abort the exit of the interpreter
