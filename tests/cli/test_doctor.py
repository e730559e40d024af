"""`sparse-attn doctor`: what it reports, and that it notices a wing that computes wrongly."""

import json
import os

import pytest
import torch

from sparse_attn import cli
from sparse_attn.cli import doctor, selfcheck
from sparse_attn.wings import base


def json_of(capsys, expected_code=0) -> dict:
    assert cli.main(["doctor", "--json"]) == expected_code
    return json.loads(capsys.readouterr().out)


def test_json_has_everything(capsys):
    report = json_of(capsys)
    assert report["ok"] is True
    assert report["versions"]["torch"] == torch.__version__
    assert report["cpu"]["torch_threads"] == torch.get_num_threads()
    assert report["devices"][0]["type"] == "cpu"
    found = {(wing["wing"], wing["device"]) for wing in report["wings"]}
    assert {(wing.name, "cpu") for wing in base.wings()} <= found
    for wing in report["wings"]:
        assert wing["available"] == (wing["why_not"] is None) == (wing["check"] is not None)


def test_every_wing_that_is_there_passes(capsys):
    for wing in json_of(capsys)["wings"]:
        if wing["available"]:
            assert wing["check"]["passed"], wing
            assert max(wing["check"]["errors"].values()) <= selfcheck.TOLERANCE


def test_text_names_wings_and_versions(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    assert "passed" in text
    for wing in base.wings():
        assert wing.name in text


def test_absent_wing_is_listed_with_its_reason(monkeypatch, capsys):
    absent = base.Wing("absent", "CPU", {"topk_attention": None}, lambda *call: "it is not built")
    monkeypatch.setattr(base, "wings", lambda: (absent,))
    assert cli.main(["doctor"]) == 0
    assert "no: it is not built" in capsys.readouterr().out


def _wrong_output(out, indices):
    return out * 1.01, indices


def _wrong_keys(out, indices):
    return out, (indices - 1).where(indices > 20, indices)


def _not_finite(out, indices):
    return out * float("nan"), indices


@pytest.mark.parametrize("damage", [_wrong_output, _wrong_keys, _not_finite])
def test_wrong_result_exits_with_1(damage, monkeypatch, capsys):
    right = selfcheck.sparse_attn.topk_attention

    def wrong(*args, **kw):
        result = right(*args, **kw)
        return damage(*result) if isinstance(result, tuple) else result

    monkeypatch.setattr(selfcheck.sparse_attn, "topk_attention", wrong)
    report = json_of(capsys, expected_code=1)
    assert report["ok"] is False
    assert not any(wing["check"]["passed"] for wing in report["wings"] if wing["check"])
    assert "FAILED" in doctor.render(report)


def test_a_wing_that_raises_is_a_failed_check(monkeypatch, capsys):
    def broken(*args, **kw):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(selfcheck.sparse_attn, "topk_attention", broken)
    report = json_of(capsys, expected_code=1)
    assert "no such kernel" in report["wings"][0]["check"]["error"]
    assert "FAILED: RuntimeError: no such kernel" in doctor.render(report)


def test_report_is_an_issue_to_fill_in(monkeypatch, capsys):
    """All that a bug report needs, and nothing that is nobody's business."""
    monkeypatch.setenv("SPARSE_ATTN_CPU_ISA_NOTE", "~here")
    monkeypatch.setenv("OMP_WAIT_POLICY", os.path.expanduser("~/policy"))
    monkeypatch.setenv("TORCH_HUB_TOKEN", "hush-hush")
    monkeypatch.setenv("UNRELATED", "of no interest")
    assert cli.main(["doctor", "--report"]) == 0
    text = capsys.readouterr().out
    for there in (
        "### What happened",
        torch.__version__,
        "self-check",
        "numpy",
        "SPARSE_ATTN_CPU_ISA_NOTE",
        "ATen",
    ):
        assert there in text
    assert "OMP_WAIT_POLICY" in text
    assert "~/policy" in text
    for absent in ("hush-hush", "of no interest", os.path.expanduser("~/")):
        assert absent not in text
    assert text.count("```") == 4
    assert cli.main(["doctor", "--report", "--json"]) == 2
