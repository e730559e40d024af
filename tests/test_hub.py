"""The layout for Hugging Face's `kernels`: it loads beside the installed package and computes the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# As `kernels` imports a variant: by its path, under a name of its own.
PROGRAM = """
import importlib.util, sys
import torch
import sparse_attn

spec = importlib.util.spec_from_file_location("some_kernel", sys.argv[1] + "/__init__.py")
kernel = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = kernel
spec.loader.exec_module(kernel)
assert kernel.topk_attention is not sparse_attn.topk_attention
assert kernel.nn.TopKAttention.__module__.startswith("some_kernel.")

torch.manual_seed(0)
query, key, value = (torch.randn(1, 4, 48, 16, requires_grad=True) for _ in range(3))
mine = kernel.topk_attention(query, key, value, 8, is_causal=True, sinks=1)
theirs = sparse_attn.topk_attention(query, key, value, 8, is_causal=True, sinks=1, backend="reference")
assert torch.equal(mine, theirs)
weight = torch.randn_like(mine)
for a, b in zip(*(torch.autograd.grad(out, (query, key, value), weight) for out in (mine, theirs))):
    assert torch.equal(a, b)
print("same", kernel.explain(query, key, value, 8).backend)
"""


def test_kernel_of_the_hub_is_the_same_package(tmp_path):
    made = subprocess.run(
        [sys.executable, ROOT / "tools" / "hub.py", tmp_path / "hub"], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "hub" / "torch-ext" / "sparse_attn" / "triton_kernels" / "__init__.py").exists()
    variant = tmp_path / "hub" / "build" / "torch-cpu"
    run = subprocess.run([sys.executable, "-c", PROGRAM, variant], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["same", "reference"]
