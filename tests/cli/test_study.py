"""`sparse-attn study`: from the command line to the results, with a small model of random weights."""

from __future__ import annotations

import json

import pytest
from helpers.studies import small_model

from sparse_attn.cli import main

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture
def model(tmp_path):
    return small_model(tmp_path / "model")


def test_retrofit(tmp_path, model, capsys):
    import sparse_attn.integrations.transformers as sparse_transformers

    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i * i % 40}" for i in range(300)))
    with_indexers = transformers.AutoModelForCausalLM.from_pretrained(model)
    sparse_transformers.add_indexers(with_indexers, num_heads=2, head_dim=8)
    sparse_transformers.save_indexers(with_indexers, tmp_path / "indexers.safetensors")
    options = [
        "--lengths",
        "200",
        "--budgets",
        "8",
        "192",
        "199",
        "--windows",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    options += ["--indexers", str(tmp_path / "indexers.safetensors"), "--calibrate", str(text)]
    command = ["study", "retrofit", "--model", str(model), "--text", str(text), *options]
    assert main(command) == 0
    assert "windows of 200 tokens (1)" in capsys.readouterr().out
    file = tmp_path / "out" / "study_retrofit.json"
    result = json.loads(file.read_text())
    rows = {(row["arm"], row["budget"]): row for row in result["rows"]}
    dense = rows["dense", None]["cross_entropy"]
    arms = ("exact, per head", "exact, share all", "window + sinks", "indexer", "int8, per head")
    for arm in (*arms, "low rank 16, per head", "exact, per head, residual"):
        # 199 of 200 keys: all but one query sees every key.
        assert abs(rows[arm, 199]["cross_entropy"] - dense) < 1e-3
        assert rows[arm, 199]["mass"] > 0.999
        assert rows[arm, 8]["mass"] < rows[arm, 199]["mass"]
    for arm in ("blocks, per head", "blocks refined, per head"):
        assert rows[arm, 192]["mass"] > 0.9
        assert (arm, 8) not in rows
    assert rows["exact, per head", 8]["mass"] > rows["exact, share all", 8]["mass"]
    assert file.with_suffix(".png").stat().st_size > 10_000
    before = file.read_text()
    assert main(command) == 0  # all rows are there: nothing is measured again
    assert json.loads(file.read_text())["rows"] == json.loads(before)["rows"]


def test_an_unknown_study(capsys):
    assert main(["study", "astrology"]) == 2
    assert "invalid choice: 'astrology'" in capsys.readouterr().err
