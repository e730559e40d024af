"""A function run in a fresh process of this very package, whatever lies in the current folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any


def alone(function: Callable, *arguments: Any, environment: dict[str, str] | None = None) -> Any:
    """`function(*arguments)` in an interpreter of its own, with these variables set from its start.

    Spawned, so that it finds modules where this process finds them: `python -m` would look in the current folder first.

    Raises:
        RuntimeError: the process died; what the function raises is raised here.
    """
    before = {name: os.environ.get(name) for name in environment or {}}
    os.environ.update(environment or {})
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool:
        raise RuntimeError(f"the process of {function.__name__} died: out of memory?") from None
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
