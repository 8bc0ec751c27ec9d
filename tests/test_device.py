"""support/device.py: the machine's memory, precision, compilation and peak."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import refused

from model import GPT, GPTConfig
from support.device import (
    attention_backend,
    peak_flops,
    peak_mb,
    pick_device,
    pick_dtype,
    try_compile,
    tune_machine,
)

ROOT = Path(__file__).parent.parent
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ALLOCATE = """
import resource, torch
from support.device import tune_allocator
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
tune_allocator()
for _ in range(20):
    before = faults()
    x = [torch.ones(300_000) for _ in range(20)]  # 1.2 MB each
    del x
print(faults() - before)
x = torch.ones(5_000_000)
del x  # after which glibc keeps up to so much for itself
start = resident()
x = [torch.ones(2_000_000) for _ in range(20)]  # 8 MB each; every second one goes
full = resident()
del x[::2]
print((full - resident()) / (full - start))
before = faults()
x = torch.ones(20_000_000)
print((faults() - before) * resource.getpagesize() / 8e7)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_memory_is_kept_if_small_and_given_back_if_large():
    """And large tensors come in huge pages."""
    environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run([sys.executable, "-c", ALLOCATE], cwd=ROOT, env=environment,
                          capture_output=True, check=True)
    faults, back, share_of_small_pages = map(float, done.stdout.split())
    assert faults < 100
    assert 0.45 < back < 0.55
    huge = HUGE_PAGES.exists() and "[never]" not in HUGE_PAGES.read_text()
    assert share_of_small_pages < 0.2 or not huge


@pytest.mark.parametrize("card, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L4", 121e12),
    ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA GeForce RTX 4090 D", None),
    ("NVIDIA H100 PCIe", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("Unknown", None)])
def test_only_known_cards_have_a_peak(monkeypatch, card, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    assert peak_flops(torch.device("cuda", 0)) == peak
    assert peak_flops(torch.device("cpu")) is None


def test_the_memory_is_that_of_the_card(monkeypatch):
    """Not of the first, where bench.py is given another one."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated",
                        lambda device=None: 5e6 if device == torch.device("cuda", 1) else 0)
    assert peak_mb(torch.device("cuda", 1)) == 5


def test_the_precision(monkeypatch):
    """As named; auto is bf16 where the device computes in it."""
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert pick_dtype("float64", cpu) == torch.float64
    for fast, on_cuda, on_cpu in ((True, torch.bfloat16, torch.bfloat16),
                                  (False, torch.float16, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, fast=fast: fast)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        assert (pick_dtype(None, cuda), pick_dtype(None, cpu)) == (on_cuda, on_cpu)
    refused(lambda: pick_dtype("float64", torch.device("mps")), "mps", "--device=cpu")


def test_a_device_that_is_not_here():
    assert pick_device("cpu") == pick_device("cpu:1") == torch.device("cpu")  # cpu:1 never ends
    for name in ("gpu", "xpu", "mps:7" if torch.backends.mps.is_available() else "mps"):
        refused(lambda name=name: pick_device(name), f"device={name}", "cpu")


def test_where_compilation_fails(run, tmp_path, monkeypatch):
    """auto goes on without it, and on a CPU never tries; test_docs.py has what is printed."""
    def fails(function):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", fails)
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=4, vocab_size=4, block_size=4))
    for wanted in (None, False):
        assert try_compile(model, wanted, torch.device("cuda")) is False
    run(tmp_path)


def test_deterministic(monkeypatch):
    """What torch then refuses, and what inductor's choices depend on."""
    inductor = pytest.importorskip("torch._inductor.config")
    with inductor.patch(deterministic=False):
        try:
            tune_machine(torch.device("cpu"))
            assert not torch.are_deterministic_algorithms_enabled()
            tune_machine(torch.device("cpu"), deterministic=True)
            assert torch.are_deterministic_algorithms_enabled() and inductor.deterministic
            assert not torch.utils.deterministic.fill_uninitialized_memory  # costs much
        finally:
            torch.use_deterministic_algorithms(False)
            torch.utils.deterministic.fill_uninitialized_memory = True


def test_attention_backend():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=16))
    for backend, name in ((SDPBackend.MATH, "math"), (SDPBackend.FLASH_ATTENTION, "flash")):
        with sdpa_kernel(backend):
            said = attention_backend(model, torch.bfloat16, torch.device("cpu"))
            assert said == f"{name} attention"
    # Macs cannot say: torch has no kernel of that for them
    assert attention_backend(model, torch.float32, torch.device("mps")) == ""
    model.config.attention = "mine"  # which may compute with anything
    assert attention_backend(model, torch.bfloat16, torch.device("cpu")) == ""
