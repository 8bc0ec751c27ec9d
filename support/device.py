"""The machine: device, precision, compilation, memory, peak FLOP/s."""

import contextlib
import ctypes
import os
import sys

import torch

from support.errors import fail, reason


def tune_machine(device: torch.device, deterministic: bool = False) -> None:
    """Settings that make training faster and change no result beyond rounding. deterministic: the
    same bits in every run, compiled ones too, for some speed."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as torch asks for
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # no result depends on it
        import torch._inductor.config as inductor

        inductor.deterministic = True  # no choice among kernels by their speed
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32
    if device.type == "cpu":
        tune_allocator()


def tune_allocator(for_training: bool = True) -> None:
    """What glibc does with freed memory, a tenth of a training step on a CPU: keep small tensors,
    give those from 4 MB on back, whole, and take them as huge pages. False: its own setting."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's, read at its first large tensor
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        # M_MMAP_THRESHOLD: whatever is larger goes back; M_TRIM_THRESHOLD: what the heap may keep
        mallopt(-3, 2**22 if for_training else 2**25)
        mallopt(-1, 2**27 if for_training else 2**26)


def pick_device(device: str | None = None, index: int = 0) -> torch.device:
    """The named device, or the best there is: CUDA (card `index`), MPS, CPU."""
    best = torch.accelerator.current_accelerator(check_available=True)
    try:
        chosen = torch.device(device) if device else best or torch.device("cpu")
    except RuntimeError:
        fail(f"device={device}: no such device; use cpu, cuda, cuda:0 or mps")
    if chosen.type == "cpu":
        return torch.device("cpu")  # a backward pass on cpu:1 waits for ever
    if best is None or best.type != chosen.type:
        fail(f"device={device}: there is no {chosen.type} here; use --device=cpu")
    if chosen.type == "cuda":
        chosen = torch.device("cuda", index if chosen.index is None else chosen.index)
        if chosen.index >= torch.cuda.device_count():
            fail(f"{chosen}: there are {torch.cuda.device_count()} cards here, counted from 0; use "
                 f"one of them, or as many processes as there are cards")
    return chosen


def pick_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """The named precision, or bf16 where the device computes in it (else fp16 on CUDA, fp32)."""
    if dtype == "float64" and device.type == "mps":
        fail("dtype=float64: mps has none; use --device=cpu")
    if dtype:
        return getattr(torch, dtype)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    fast = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return torch.bfloat16 if fast else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Mixed precision for bf16 and fp16, nothing for fp32 and fp64."""
    if dtype in (torch.bfloat16, torch.float16):
        return torch.autocast(device.type, dtype)
    return contextlib.nullcontext()


def can_compile(wanted: bool | None, device: torch.device) -> bool:
    """Whether to compile: if it is wanted (None: on CUDA) and a small function compiles here. With
    None, what fails to compile later runs eagerly, with torch's warning."""
    if wanted is False or (wanted is None and device.type != "cuda"):
        return False
    try:
        probe = torch.compile(lambda z: z.sin() + z.cos())
        probe(torch.ones(8, device=device))
    except Exception as error:
        if wanted:
            fail(f"compile=True, but torch.compile does not work here: {reason(error)}; "
                 f"use --compile=False")
        print(f"not compiled, so slower: torch.compile does not work here: {reason(error)}",
              file=sys.stderr)
        return False
    torch._dynamo.config.suppress_errors = not wanted
    return True


def attention_backend(model: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> str:
    """What scaled_dot_product_attention computes with, for this model's heads; "" on MPS, or where
    a fork attends. (An older CUDA on LD_LIBRARY_PATH takes cuDNN's away without a word.)"""
    c = model.config
    if c.attention != "causal" or device.type not in ("cpu", "cuda"):
        return ""
    q = torch.empty(1, c.n_head, c.block_size, c.d_head, dtype=dtype, device=device)
    backend = torch.nn.attention.SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True))
    return f"{backend.name.lower().removesuffix('_attention')} attention"


def try_compile(model: torch.nn.Module, wanted: bool | None, device: torch.device,
                blocks: bool = False) -> bool:
    """Compile the model in place if it is wanted and works here; with `blocks` each of its blocks,
    and head and loss as one function."""
    if not can_compile(wanted, device):
        return False
    if blocks:
        for block in model.transformer.h:
            block.compile(dynamic=False)
        model.head_and_loss = torch.compile(model.head_and_loss, dynamic=False)
    else:
        model.compile(dynamic=False)
    return True


def compile_seconds() -> float:
    """What torch.compile has taken so far in this process."""
    if "torch._dynamo" not in sys.modules:
        return 0.0
    return torch._dynamo.utils.calculate_time_spent()["total_wall_time"]


PEAK_FLOPS = {  # dense bf16 (fp16 on V100 and T4) FLOP/s by card, the makers' data sheets
    "B200": 2250e12, "H200": 989e12, "H100": 989e12, "GH200": 989e12, "A100": 312e12,
    "L40S": 362e12, "L4": 121e12, "A10": 125e12, "V100": 125e12, "T4": 65e12, "5090": 209.5e12,
    "4090": 165.2e12, "3090": 71e12}


def peak_flops(device: torch.device) -> float | None:
    """Of a known card; None for another, and for a CPU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    words = name.replace("-", " ").split()
    if {"PCIe", "PCIE", "NVL", "Laptop", "MIG", "Ti", "D"} & set(words):  # slower namesakes
        return None
    return next((PEAK_FLOPS[word] for word in words if word in PEAK_FLOPS), None)


def peak_mb(device: torch.device) -> int | None:
    """The most memory that this process has had so far: of the GPU, or resident (on Linux)."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6)
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="utf-8") as file:
        kilobytes = next(line.split()[1] for line in file if line.startswith("VmHWM"))
        return round(int(kilobytes) * 1024 / 1e6)
    return None
