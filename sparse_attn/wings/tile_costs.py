"""What dense tiles and gathering cost on this machine, in a file: by it the CPU wing chooses between the two.

The file is the one that SPARSE_ATTN_TILE_COSTS names, else `sparse_attn/tile_costs.json` in `~/.cache` (or
XDG_CACHE_HOME). `sparse-attn bench --calibrate` writes it. Without one the costs that the extension came with hold. It
changes which way a call goes and so how sums round, never which keys are chosen.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from sparse_attn.files import read_json, refusal, write_text

VARIABLE = "SPARSE_ATTN_TILE_COSTS"
NAMES = (
    "gather", "candidate", "tile_key", "tile", "gather_backward", "tile_key_backward", "tile_backward",
)  # fmt: skip
WHAT = "costs of tiles"
MOST_BYTES = 65536


def path() -> Path:
    """Where the costs of this machine are kept."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparse_attn" / "tile_costs.json"
    )


def read(file: Path) -> dict[str, float]:
    """Costs in nanoseconds by name; ValueError where the file holds none."""
    costs = read_json(file, WHAT, MOST_BYTES)
    if not isinstance(costs, dict) or set(costs) != set(NAMES):
        raise refusal(file, WHAT, f"it must have the numbers {', '.join(NAMES)} and nothing else")
    for name, cost in costs.items():
        if not isinstance(cost, (int, float)) or isinstance(cost, bool) or not 0 <= cost <= 1e6:
            raise refusal(file, WHAT, f"{name} must be from 0 to 1e6 nanoseconds, got {str(cost)[:40]}")
    return {name: float(costs[name]) for name in NAMES}


def write(costs: dict[str, float], file: Path | None = None) -> Path:
    file = path() if file is None else file
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps({name: costs[name] for name in NAMES}, indent=2) + "\n")
    return file


def load(module: Any) -> None:
    """Hands the file's costs to the extension, if there is a file; one that is damaged is left aside, in words."""
    try:
        file = path()
        if not file.exists():
            return
        costs = read(file)
    except (OSError, ValueError, RuntimeError) as error:
        warnings.warn(f"sparse_attn goes by the costs that it came with: {error}", stacklevel=2)
        return
    module.set_tile_costs(**costs)
