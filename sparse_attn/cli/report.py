"""What a bug report needs beside what the doctor found: `sparse-attn doctor --report`."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib import metadata

import torch

# What can change a result or a time here; of others only sparse_attn's and torch's own are shown.
PACKAGES = (
    "numpy",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "triton",
    "pytorch-triton-rocm",
    "pytorch-triton-xpu",
    "flash-attn",
    "rich",
    "matplotlib",
    "scipy",
)
PREFIXES = (
    "SPARSE_ATTN_",
    "TRITON_",
    "TORCH",
    "PYTORCH_",
    "OMP_",
    "KMP_",
    "MKL_",
    "CUDA_",
    "HIP_",
    "NVIDIA_",
)
HIDDEN = ("TOKEN", "KEY", "SECRET", "PASSWORD")

TEMPLATE = """\
### What happened

<!-- One sentence: what you called, what came, what you expected. The whole traceback, if there is one. -->

### A program that shows it

```python
import torch
import sparse_attn

# the smallest call that goes wrong; shapes, dtype, device and the values matter
```

<details><summary>sparse-attn doctor --report</summary>

```text
{text}
```

</details>"""


def render(doctor: str) -> str:
    """A report in Markdown around the doctor's text."""
    parts = [doctor, _list("packages", packages()), _list("environment", environment(os.environ)), _torch()]
    return TEMPLATE.format(text="\n\n".join(parts))


def packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Variables that steer this package, torch and their threads; nothing that could be a secret, no home folder."""
    home = os.path.expanduser("~")
    return {
        name: value.replace(home, "~") if len(home) > 1 else value
        for name, value in sorted(variables.items())
        if name.startswith(PREFIXES) and not any(word in name for word in HIDDEN)
    }


def _torch() -> str:
    facts = {
        "C library": " ".join(platform.libc_ver()) or "unknown",
        "default dtype": str(torch.get_default_dtype()),
        "deterministic": str(torch.are_deterministic_algorithms_enabled()),
        "float32 products": torch.get_float32_matmul_precision(),
        "threads": f"{torch.get_num_threads()} in an op, {torch.get_num_interop_threads()} between ops",
    }
    return _list("torch", facts) + "\n\n" + torch.__config__.parallel_info().strip()


def _list(title: str, facts: Mapping[str, str]) -> str:
    if not facts:
        return f"{title}\n  none"
    width = max(map(len, facts))
    return "\n".join([title, *(f"  {name.ljust(width)}  {fact}" for name, fact in facts.items())])
