"""Each fault that was found by use is mended, and the page about them has every case."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from faults import all_cases

DOC = Path(__file__).resolve().parents[1] / "docs" / "faults.md"


@pytest.mark.torch_defaults  # models and other people's code allocate without writing, as they do elsewhere
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in all_cases()])
def test_the_fault_is_mended(case):
    if case.run.__module__.endswith(("huggingface", "copies")):
        pytest.importorskip("transformers", reason="transformers is not installed")
    if case.run.__module__.endswith("processes") and not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert case.run()


def test_the_page_has_every_case():
    page = DOC.read_text("utf-8")
    assert [case.name for case in all_cases() if f"`{case.name}`" not in page] == []
