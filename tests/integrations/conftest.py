"""Fixtures of the tests of Hugging Face models."""

from __future__ import annotations

import warnings

import pytest

from sparse_attn.integrations import transformers as sparse_transformers


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


@pytest.fixture
def no_shortcut(monkeypatch):
    """A budget that holds all keys goes to SDPA; here it has to go through our kernels."""
    monkeypatch.setattr(
        sparse_transformers, "_is_dense", lambda module, key, options, reach: options["top_k"] is None
    )
