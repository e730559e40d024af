"""docs/findings.md shows what the committed results files hold."""

from __future__ import annotations

import json

from benchmarks.studies import findings


def test_the_page_is_what_the_results_give():
    assert findings.page() == findings.PAGE.read_text("utf-8"), (
        "python -m benchmarks.studies.findings --write"
    )


def test_a_part(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- study x: begin -->\nold\n<!-- study x: end -->\nafter\n")
    machine = {"cpu": "C", "cpu_flags": [], "system": "S", "threads": 1, "torch": "2", "sparse_attn": "0"}
    machine |= {"wing": "cpu", "date": "today", "command": "the command"}
    tables = [{"title": "T", "columns": ["a", "b"], "rows": [["c", "1"]]}]
    (tmp_path / "study_x.json").write_text(json.dumps({"machine": machine, "tables": tables}))
    monkeypatch.setattr(findings, "PAGE", page)
    monkeypatch.setattr(findings, "RESULTS", tmp_path)
    made = findings.page()
    assert "| a | b |\n| --- | ---: |\n| c | 1 |" in made
    assert "old" not in made
    assert made.startswith("before\n")
    assert made.endswith("<!-- study x: end -->\nafter\n")
    assert "`the command`" in made


def test_an_evaluation(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("<!-- evaluation x: begin -->\nold\n<!-- evaluation x: end -->\n")
    machine = {"cpu": "C", "cpu_flags": [], "system": "S", "threads": 1, "torch": "2", "sparse_attn": "0"}
    machine |= {"wing": "cpu", "date": "today", "command": "the command"}
    common = {"task": "text", "length": 100, "document": "d"}
    rows = [
        {**common, "arm": "dense", "keys": None, "nats": 2.0},
        {**common, "arm": "exact", "keys": 10, "nats": 2.25, "kl": 0.5, "same": 0.75},
    ]
    result = {"machine": machine, "about": {"model": "m"}, "rows": rows}
    (tmp_path / "evaluation_x.json").write_text(json.dumps(result))
    monkeypatch.setattr(findings, "PAGE", page)
    monkeypatch.setattr(findings, "RESULTS", tmp_path)
    made = findings.page()
    assert "| exact (oracle) | 10 (10.0%) | +0.2500 | 0.5000 | 75.0 % | 1 |" in made
    assert "evaluation_x.png" in made
    assert "old" not in made
