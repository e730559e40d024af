"""`sparse-attn evaluate` and `sparse-attn train-indexer`: from the command line to the files, with a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.studies import small_model

from sparse_attn.cli import main

pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture
def model(tmp_path):
    return str(small_model(tmp_path / "model"))


@pytest.fixture
def texts(tmp_path):
    files = [tmp_path / f"{i}.txt" for i in range(4)]
    for i, file in enumerate(files):
        file.write_text(" ".join(f"w{(j * j + i) * (i + 3) % 40}" for j in range(300)))
    return list(map(str, files))


def test_training_then_evaluation(tmp_path, model, texts, capsys):
    indexers, out = str(tmp_path / "indexers.safetensors"), tmp_path / "out" / "evaluation.json"
    sizes = ["--length", "200", "--steps", "3", "--updates", "2", "--queries", "32", "--heads", "2"]
    train = [
        "train-indexer",
        "--model",
        model,
        "--text",
        *texts,
        *sizes,
        "--head-dim",
        "8",
        "--out",
        indexers,
    ]
    assert main([*train, "--budget", "24", "--held-out", "1"]) == 0
    told = capsys.readouterr().out
    assert "nats from the attention at first" in told
    assert "indexer+blocks" in told
    assert "3.txt" in (tmp_path / "indexers.evaluation.json").read_text()  # the last text was held out

    more = [
        "--indexers",
        indexers,
        "--calibrate",
        texts[3],
        "--rank",
        "4",
        "--lengths",
        "200",
        "--cases",
        "1",
    ]
    what = [
        "--selector",
        "indexer+tail",
        "indexer+blocks",
        "low_rank",
        "window",
        "--budget",
        "10%",
        "--documents",
        "2",
    ]
    command = ["evaluate", "--model", model, "--text", *texts[:3], *what, *more, "--out", str(out)]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "exact+tail (oracle)" in told
    result = json.loads(out.read_text())
    arms = {(r["task"], r["arm"]) for r in result["rows"]}
    for arm in ("exact", "exact+tail", "indexer+tail", "indexer+blocks", "low_rank", "window"):
        assert ("text", arm) in arms
        assert ("needles", arm) in arms
    assert ("recall", "indexer") in arms
    assert "model" not in result["machine"]["command"]  # no folders
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert main([*command, "--json"]) == 0  # nothing is run again
    printed = json.loads(capsys.readouterr().out)
    assert printed["rows"] == result["rows"]
    assert printed["tables"][0]["columns"][0] == "selection"


def test_a_training_that_was_interrupted_goes_on(tmp_path, model, texts, monkeypatch, capsys):
    from sparse_attn.distillation import indexers as training

    files = [tmp_path / name for name in ("whole.safetensors", "parts.safetensors")]
    options = ["--length", "100", "--steps", "6", "--queries", "16", "--heads", "1", "--head-dim", "8"]
    command = ["train-indexer", "--model", model, "--text", *texts, *options, "--held-out", "0", "--out"]
    assert main([*command, str(files[0])]) == 0
    real, calls = training._save, []

    def stop(*arguments):
        real(*arguments)
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "_save", stop)
    assert main([*command, str(files[1])]) == 130
    assert not files[1].exists()
    assert main([*command, str(files[1])]) == 0
    assert len(calls) == 6
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--selector", "astrology"], "selector must be one of exact"),
        (["--budget", "much"], "budget must be a number of keys"),
        (["--budget", "0%"], "budget must be a number of keys or a share such as 12.5%, got '0%'"),
        (["--budget", "nan%"], "got 'nan%'"),
        (["--budget", "200"], "no selection can have a budget of 200 at 200 tokens"),
        (["--lengths", "1000"], "no document has more than 1000 tokens"),
        (["--lengths", "200", "1000"], "the longest, 0.txt, has 300"),
        (["--out", "."], "--out . cannot be written: it is a folder"),
        (["--out", "picture.png"], "--out must be a JSON file"),
        (["--out", f"{__file__}/e.json"], "is no folder that can be written in"),
        (["--gguf", "nothing.gguf"], "--gguf nothing.gguf is not in"),
        (["--model", "/nowhere"], "--model /nowhere must be a folder, and there is none of this name"),
        (["--model", str(Path(__file__).parent)], "has no config.json, which a model of transformers has"),
        (["--dense", "none"], "invalid choice: 'none'"),
        (
            ["--selector", "indexer"],
            "--selector indexer needs --indexers, a file of sparse-attn train-indexer",
        ),
        (["--selector", "low_rank"], "--selector low_rank needs --calibrate, texts that it is fitted on"),
        (["--tasks", "text", "needles", "--lengths", "40"], "length must leave room for 6 needles"),
        (["--indexers", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--text", "nowhere.txt"], "--text nowhere.txt cannot be read"),
        (["--model", "nowhere/at all"], "--model nowhere/at all cannot be loaded: there is no such folder"),
    ],
)
def test_wrong_options_are_one_sentence(more, match, tmp_path, model, texts, capsys):
    command = ["evaluate", "--model", model, "--text", *texts, "--lengths", "200", "--tasks", "text"]
    assert main([*command, "--out", str(tmp_path / "e.json"), *more]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert match in error


def test_what_is_left_out_is_said(tmp_path, model, texts, capsys):
    short = tmp_path / "short.txt"
    short.write_text("w1 w2 w3")
    files = [texts[0], str(short)]
    more = ["--lengths", "250", "--budget", "10%", "192", "--selector", "blocks", "--tasks", "text"]
    assert (
        main(["evaluate", "--model", model, "--text", *files, *more, "--out", str(tmp_path / "e.json")]) == 0
    )
    said = capsys.readouterr().err
    assert "note: not long enough for 250 tokens and left out there: short.txt" in said
    assert "at least 192 keys (three of 64): blocks at 10%" in said
    twice = tmp_path / "twice" / "0.txt"
    twice.parent.mkdir()
    twice.write_text("w1")
    command = ["evaluate", "--model", model, "--text", texts[0], str(twice), "--lengths", "100"]
    assert main([*command, "--out", str(tmp_path / "f.json")]) == 2
    assert "must have different names, by which results are kept, got 0.txt twice" in capsys.readouterr().err


def test_training_needs_a_budget_below_its_length(model, texts, tmp_path, capsys):
    out = ["--out", str(tmp_path / "i.safetensors"), "--budget", "100"]
    assert main(["train-indexer", "--model", model, "--text", *texts, "--length", "100", *out]) == 2
    assert "--budget must be fewer keys than --length 100, got 100" in capsys.readouterr().err


def test_training_needs_texts_that_are_long_enough(model, texts, tmp_path, capsys):
    out = ["--out", str(tmp_path / "i.safetensors")]
    assert main(["train-indexer", "--model", model, "--text", *texts, "--length", "300", *out]) == 2
    assert "texts of more than 300 tokens, got 0" in capsys.readouterr().err
