"""Autotuning, where it is asked for: SPARSE_ATTN_TRITON_TUNE=1 in the environment.

Each kernel names a few configurations per class of shapes, the first of which is taken without timing anything. Where
tuning is asked for, the first call of a class on a device runs all of them (compiling each, so it takes a minute rather
than seconds), and the fastest serves from then on: in this process, and through a small JSON file in the user's cache
folder in later ones. The file's keys name the device and Triton's version; deleting it tunes anew.

Configurations differ in the order of their sums, so a tuned kernel may round otherwise than an untuned one. For that
reason torch.use_deterministic_algorithms(True) wins over the variable. Nothing is timed while a CUDA graph is captured:
a class that is met there first gets its first configuration, and is tuned at its next call outside of one.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import triton
from triton.runtime.errors import OutOfResources

VARIABLE = "SPARSE_ATTN_TRITON_TUNE"
GAIN = 0.97  # another configuration must take less than this share of the first one's time: the rest is noise
REPEATS = 7
LARGEST = 1 << 24  # bytes of the file of winners that are read: of a larger one nothing is known

Config = TypeVar("Config")
Result = TypeVar("Result")

_lock = threading.Lock()
_winners: dict[str, str] | None = None  # class → the configuration as text, once the file has been read


def run_tuned(
    kernel: str,
    shape: Sequence[object],
    configs: Sequence[Config],
    run: Callable[[Config], Result],
    device: torch.device,
    repeatable: bool = True,
) -> Result:
    """run(config) of the configuration that `chosen` names."""
    return run(chosen(kernel, shape, configs, run, device, repeatable))


def chosen(
    kernel: str,
    shape: Sequence[object],  # what the choice depends on; sizes as classes (`size_class`)
    configs: Sequence[Config],
    run: Callable[[Config], object],  # launches
    device: torch.device,
    repeatable: bool = True,  # False where a second run would add to the results of the first: it is never timed
) -> Config:
    """The first configuration or, where tuning is asked for, the fastest."""
    if len(configs) == 1 or not _asked():
        return configs[0]
    words = " ".join(str(s).removeprefix("torch.") for s in shape)
    key = f"{_name(device)}, triton {triton.__version__}: {kernel} {words}"
    with _lock:  # autograd's threads come here too, and two that time at once spoil each other's times
        known = _remembered().get(key)
        for config in configs:
            if repr(config) == known:
                return config
        if not repeatable or _must_not_wait(device):
            return configs[0]
        seconds = [_seconds(run, config, device) for config in configs]
        best = configs[min(range(len(configs)), key=seconds.__getitem__)]
        if min(seconds) >= GAIN * seconds[0]:
            best = configs[0]
        _remember(key, repr(best))
        return best


def distinct(configs: Sequence[Config]) -> list[Config]:
    """Without repetitions, which limits on sizes can make."""
    return list({repr(config): config for config in configs}.values())


def size_class(size: int) -> int:
    """The power of two that holds a size."""
    return triton.next_power_of_2(max(1, size))


def cache_file() -> Path:
    """Where winners are kept for later processes."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "sparse_attn" / "triton_tuning.json"


def measure(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that one call takes: the median of some, after one that compiles."""
    run()
    if device.type == "cpu":  # the interpreter
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    module = torch.get_device_module(device)
    events = [[module.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
    for start, end in events:
        start.record()
        run()
        end.record()
    module.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def _asked() -> bool:
    return os.environ.get(VARIABLE) == "1" and not torch.are_deterministic_algorithms_enabled()


def _must_not_wait(device: torch.device) -> bool:
    """Whether a graph is being made, of CUDA's or of torch.compile's: nothing may be timed then."""
    if torch.compiler.is_compiling():
        return True
    if device.type == "cpu":
        return False
    capturing = getattr(torch.get_device_module(device), "is_current_stream_capturing", None)
    return capturing is not None and capturing()


def _seconds(run: Callable[[Config], object], config: Config, device: torch.device) -> float:
    try:
        return measure(lambda: run(config), device)
    except OutOfResources:  # more shared memory than this device has
        return float("inf")


def _name(device: torch.device) -> str:
    if device.type == "cpu":
        return "interpreter"
    return torch.get_device_module(device).get_device_name(device)


def _read() -> dict[str, str]:
    """What the file holds: nothing where it is missing or broken, as it only saves time."""
    try:
        with cache_file().open("rb") as file:
            text = file.read(LARGEST)
        found = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _remembered() -> dict[str, str]:
    global _winners
    if _winners is None:
        _winners = _read()
    return _winners


def _remember(key: str, config: str) -> None:
    _remembered()[key] = config
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another process may have written meanwhile; a rename leaves no half of a file to a third.
        text = json.dumps({**_read(), key: config}, indent=1, sort_keys=True) + "\n"
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            try:
                file.write(text)
                file.close()
                os.replace(file.name, path)
            finally:
                Path(file.name).unlink(missing_ok=True)
    except OSError:
        pass  # a home that cannot be written to: this process remembers
