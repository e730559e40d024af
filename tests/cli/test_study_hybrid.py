"""The study of approximated heads: a run of a few steps has every number, twice the same."""

import json
import math

import pytest

from benchmarks.studies import hybrid
from sparse_attn.cli import main
from sparse_attn.demo import text as demo_text

SMALL = {
    "steps": 3,
    "selector_steps": 3,
    "approximator_steps": 2,
    "budgets": (2, 5),
    "context": 32,
    "batch": 2,
    "hidden": 8,
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(demo_text, "WINDOWS", 4)


def numbers(result) -> list[float]:
    if isinstance(result, dict):
        return [n for value in result.values() for n in numbers(value)]
    if isinstance(result, list):
        return [n for value in result for n in numbers(value)]
    return [result] if isinstance(result, (int, float)) else []


@pytest.mark.torch_defaults
def test_every_number_is_there_and_comes_again():
    calls = []
    result = hybrid.run(**SMALL, progress=lambda *step: calls.append(step[0]))
    assert calls.count("train teacher") == 3
    assert calls.count("train selector") == 2 * 3
    assert calls.count("train approximator") == 2 * 2 * 2
    assert calls.count("train indexers") == 2 * 3
    assert set(result["selection"]) == {
        "exact top-k",
        "KeySelector, positions",
        "KeySelector, distances",
        "indexer, all heads",
        "indexer, per head",
        "frequent distances",
        "frequent positions",
        "last keys",
        "random keys",
    }
    assert set(result["students"]) == {
        "exact top-k",
        "last keys",
        "KeySelector, positions, exact attention",
        "KeySelector, positions, HeadApproximator",
        "KeySelector, positions, HeadApproximator, half of the heads",
        "KeySelector, distances, exact attention",
        "KeySelector, distances, HeadApproximator",
        "KeySelector, distances, HeadApproximator, half of the heads",
    }
    assert result["selection"]["exact top-k"]["top1"] == 1.0
    for chosen in result["selection"].values():
        assert set(chosen["recall"]) == set(chosen["layer_error"]) == {2, 5}
        assert chosen["recall"][2] < chosen["recall"][5] <= 1.0
    for student in result["students"].values():
        assert set(student) == {2, 5}
        assert student[2]["teacher_loss"] == result["teacher"]["held_out_loss"]
    assert result["settings"]["held_out_tokens"] == 4 * 32
    json.dumps(result)
    assert all(math.isfinite(n) for n in numbers(result))
    again = hybrid.run(**SMALL)
    for part in ("teacher", "selector_loss", "selection", "students"):
        assert again[part] == result[part], part


@pytest.mark.torch_defaults
def test_two_ways_to_the_same_layer_error():
    """A student's layers answer for themselves, so they err as the selection that they use."""
    result = hybrid.run(**SMALL)
    for chosen, student in (
        ("exact top-k", "exact top-k"),
        ("last keys", "last keys"),
        ("KeySelector, positions", "KeySelector, positions, exact attention"),
        ("KeySelector, distances", "KeySelector, distances, exact attention"),
    ):
        for k in (2, 5):
            want = result["selection"][chosen]["layer_error"][k]
            assert result["students"][student][k]["layer_error"] == pytest.approx(want, rel=1e-3)


@pytest.mark.torch_defaults
def test_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(hybrid, "QUICK", SMALL)
    command = ["study", "hybrid", "--quick", "--out", str(tmp_path)]
    assert main(command) == 0
    text = capsys.readouterr().out
    file = tmp_path / "study_hybrid_quick.json"
    result = json.loads(file.read_text())
    for name in (*result["rows"][0]["selection"], *result["rows"][0]["students"]):
        assert name.split(",")[0] in text
    assert file.with_suffix(".png").stat().st_size > 10_000
    assert main(command) == 0  # the seed is there: nothing is trained again
    assert json.loads(file.read_text())["rows"] == result["rows"]
