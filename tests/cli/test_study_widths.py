"""`sparse-attn study widths`: its tables and deciles, and from the command line to the results in miniature."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.studies import widths
from benchmarks.studies import widths_model as models
from sparse_attn.cli import main
from tests.helpers.studies import in_miniature, refuses_other_settings, words

for package in ("matplotlib", "rich", "scipy", "tokenizers"):
    pytest.importorskip(package, reason=f"{package} is not installed")

COUNTS = (10_000 / torch.arange(1, 1001)).long()
TINY = widths.Settings(
    vocabulary=600, context=16, batch=2, steps=4, rates=(1e-3, 3e-3), seeds=2, shares=(2,), windows=8
)


def test_in_miniature(tmp_path, capsys):
    result, arguments = in_miniature(widths, TINY, tmp_path, "--text", *words(tmp_path, documents=10))
    assert "planned 1/2 − uniform 1/2" in capsys.readouterr().out
    file = tmp_path / "out" / "study_widths_quick.json"
    assert len(result["rows"]) == 4 * 2 + 4  # four arms at two rates, then the second seed at the better one
    assert result["about"]["text"]["documents"] == 10
    result["rows"] = [r for r in result["rows"] if r["seed"] == 0 and r["arm"] != "three bands"]
    file.write_text(json.dumps(result))
    arguments.report = True  # of what is there, and nothing is trained
    assert widths.execute(arguments, TINY) == 0
    assert json.loads(file.read_text())["rows"] == result["rows"]
    refuses_other_settings(widths, TINY, arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps: must be at least 1, got 0"),
        (["--seeds", "few"], "--seeds: must be a whole number, got 'few'"),
        (["--threads", "-1"], "--threads: must be at least 1, got -1"),
        (["--text", "nowhere.txt"], "--text nowhere.txt cannot be read: No such file or directory"),
        (["--text", "short.txt"], "--text has 1 tokens to train on; a window of this study takes 65"),
        (["--full"], "--quick and --full exclude each other"),
    ],
)
def test_bad_options(tmp_path, monkeypatch, capsys, options, message):
    (tmp_path / "short.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sparse_attn.cli.study.checkout", lambda: tmp_path)
    assert main(["study", "widths", "--quick", "--out", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err


def test_arms_of_one_size():
    shapes = widths.arms(COUNTS, widths.Settings())
    full = shapes["full table"].parameters()
    assert full == 1000 * models.WIDTH
    for share in (2, 4):
        uniform, planned = (shapes[f"{kind} 1/{share}"].parameters() for kind in ("uniform", "planned"))
        assert 0.9 * full / share < uniform <= full / share
        assert 0.95 * uniform < planned <= uniform
    recipe = shapes["three bands"]
    assert recipe.widths == (192, 128, 51)
    occurrences = [int(COUNTS[recipe.token_band == b].sum()) / int(COUNTS.sum()) for b in range(3)]
    assert occurrences == pytest.approx([0.80, 0.15, 0.05], abs=0.02)


@pytest.mark.parametrize("arm", ["full table", "uniform 1/4", "planned 1/4", "three bands"])
def test_a_table_has_its_parameters_and_ties_the_head(arm):
    torch.manual_seed(0)
    shape = widths.arms(COUNTS, widths.Settings())[arm]
    tied = models.Tied(shape)
    assert sum(p.numel() for p in tied.parameters()) == shape.parameters()
    ids = torch.arange(1000)
    vectors = tied(ids).detach()
    assert float(vectors.var()) == pytest.approx(1.0, rel=0.15)
    hidden = torch.randn(1, 3, models.WIDTH)
    logits = hidden @ (vectors / models.WIDTH**0.5).T
    expected = torch.nn.functional.cross_entropy(logits[0], torch.tensor([0, 5, 999]))
    found = tied.loss(hidden, torch.tensor([[0, 5, 999]]), "mean").item()
    assert found == pytest.approx(expected.item(), rel=1e-4)


def test_the_body_starts_alike_in_all_arms():
    shapes = widths.arms(COUNTS, widths.Settings())
    one, other = (models.GPT(shapes[arm], 8, 3) for arm in ("full table", "planned 1/4"))
    assert torch.equal(one.positions, other.positions)
    assert all(
        torch.equal(a, b) for a, b in zip(one.blocks.parameters(), other.blocks.parameters(), strict=True)
    )


def test_deciles_hold_a_tenth_each():
    tenth = widths.deciles(COUNTS)
    held = torch.zeros(10).index_add_(0, tenth, COUNTS.float()) / COUNTS.sum()
    assert tenth[0] == 0
    assert bool((tenth.diff() >= 0).all())
    assert held[3:].tolist() == pytest.approx([0.1] * 7, abs=0.03)
