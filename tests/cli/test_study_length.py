"""`sparse-attn study length`: from the command line to the results, and what it holds its contenders to."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.studies import length as study
from sparse_attn.cli import main
from sparse_attn.selection import Selection

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("rich", reason="rich is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")


def test_quick(tmp_path, capsys):
    command = ["study", "length", "--quick", "--threads", "1", "--lengths", "1024", "--out", str(tmp_path)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "500 times as fast as dense" in out
    file = tmp_path / "study_length_quick.json"
    result = json.loads(file.read_text())
    rows = result["rows"]
    assert {r["method"] for r in rows if "method" in r} == set(study.METHODS)
    assert all(r["seconds"] > 0 and r["error"] < study.TOLERANCE for r in rows if "method" in r)
    found = {(r["recall_of"], r["inputs"]): r for r in rows if "recall_of" in r}
    assert len(found) == 2 * len(study.RECALLED)
    for row in found.values():
        assert 0 < row["recall"] <= 1
        assert row["mass"] <= row["exact_mass"] + 1e-6
    # Neighbours that look alike are what these selections suppose.
    assert found["blocks", "grouped"]["recall"] > found["blocks", "independent"]["recall"]
    (decoding,) = (r for r in rows if "decoding" in r)
    assert decoding["dense_ms"] > 0
    assert decoding["sparse_ms"] > 0
    assert file.with_suffix(".png").stat().st_size > 10_000
    assert main(command) == 0  # all rows are there: nothing is measured again
    assert json.loads(file.read_text())["rows"] == rows


@torch.no_grad()
def test_a_method_that_is_wrong_is_not_timed():
    tensors = study.inputs(1024)
    right = study.call_of("exact", *tensors)
    assert study.check("exact", *tensors, right) < study.TOLERANCE
    with pytest.raises(AssertionError, match="exact, T=1024: row 256 is off by"):
        study.check("exact", *tensors, lambda rows: right(rows) + 0.001)
    query, key, value = tensors
    other = query.clone()
    other[:, :, 256] += 1  # so that other keys are the best ones
    with pytest.raises(AssertionError, match="row 256"):
        study.check("exact", other, key, value, right)


@torch.no_grad()
def test_blocks_of_queries_are_the_rows_of_the_whole():
    tensors = study.inputs(1024)
    for method in study.METHODS:
        call = study.call_of(method, *tensors)
        whole = call(slice(0, 1024))
        if method != "dense":  # there each row of a block is given what the middle one sees
            torch.testing.assert_close(call(slice(512, 768)), whole[:, :, 512:768])


def test_the_length_at_which_it_is_500_times_as_fast(tmp_path):
    from benchmarks.studies.results import Results

    found = Results(tmp_path / "r.json", "command", 1)
    for n, dense, blocks in ((1024, 1.0, 0.1), (2048, 4.0, 0.1), (4096, 60.0, 0.1), (8192, 240.0, 0.4)):
        for method, seconds in (("dense", dense), ("blocks", blocks), ("exact", dense / 3)):
            found.rows.append({"method": method, "length": n, "seconds": seconds})
    study.conclude(found)
    assert found.about["conclusions"]["blocks"] == {
        "passed_at": 4096,
        "continued": None,
        "best": 600.0,
        "best_at": 4096,
    }
    assert found.about["conclusions"]["exact"]["passed_at"] is None
    found.rows = [r for r in found.rows if r["length"] < 4096]
    found.rows += [{"method": m, "length": 512, "seconds": s} for m, s in (("dense", 0.25), ("blocks", 0.1))]
    study.conclude(found)
    # 2.5, 10, 40 times at 512, 1024, 2048: four times as much at twice the length.
    assert found.about["conclusions"]["blocks"]["continued"] == round(2048 * (500 / 40) ** 0.5)


def test_what_is_found():
    best = torch.tensor([[[[0, 5], [8, 9], [1, 8], [3, -1]]]], dtype=torch.int32)
    blocks = Selection(torch.tensor([[[[0, 2], [0, -1]]]], dtype=torch.int32), study.BLOCK, 2)
    assert study.share_found(blocks, best) == 1.0
    tokens = Selection(torch.tensor([[[[0, 1], [9, -1], [1, 8], [2, 4]]]], dtype=torch.int32))
    assert study.share_found(tokens, best) == 4 / 7
