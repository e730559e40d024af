"""The examples run."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.mark.parametrize("top_k", [None, 8])
def test_nanogpt(top_k):
    train = runpy.run_path(str(EXAMPLES / "nanogpt.py"))["train"]
    assert train(top_k, steps=3) < 4.0  # a little over chance, ln 16 = 2.77, at the first steps


def test_packed(tmp_path):
    """An interrupted training ends where an uninterrupted one does, and learns."""
    train = runpy.run_path(str(EXAMPLES / "train_packed.py"))["train"]
    whole = train(6, tokens=600)
    file = str(tmp_path / "packed.pt")
    assert train(3, tokens=600, checkpoint=file) == whole[:3]
    assert train(6, tokens=600, checkpoint=file) == whole
    assert whole[-1] < whole[0]
