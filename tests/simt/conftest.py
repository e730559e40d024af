"""Of several processes of one test run, one builds the simulated device and the others wait for it."""

from __future__ import annotations

import pytest

from simt import device


@pytest.fixture(scope="session", autouse=True)
def _built_by_one():
    if device.why_not() is not None:
        return
    import fcntl  # not on every system, but where the device can be built

    folder = device.ROOT / "build"
    folder.mkdir(exist_ok=True)
    with (folder / "simt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        device.library()
