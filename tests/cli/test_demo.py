"""`sparse-attn demo`: a run of a few steps, its JSON and picture, Ctrl-C, and bad options."""

import json
import math
from pathlib import Path

import pytest

import sparse_attn
from sparse_attn import cli
from sparse_attn.demo import model, pace, session, text, timing, train

TINY = ["--steps", "2", "--context", "48", "--batch", "2", "--top-k", "8", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _quick(request, monkeypatch):
    """A small validation set, a short sample, one repetition of what is timed, and no picture unless asked for."""
    if "picture" not in request.fixturenames:
        monkeypatch.setattr("sparse_attn.cli.demo.draw", lambda *what: None)
    monkeypatch.setattr(text, "WINDOWS", 4)
    monkeypatch.setattr(session, "SAMPLE_LENGTH", 8)
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(pace, "WARM_UP", 0)
    monkeypatch.setattr(pace, "FEWEST", 1)
    monkeypatch.setattr(pace, "PATIENCE", 0.0)


@pytest.fixture
def picture():
    """For tests that want the picture drawn, which takes a second."""


def demo(tmp_path: Path, *options: str) -> int:
    return cli.main(["demo", *TINY, "--out", str(tmp_path), *options])


def test_json_run_has_every_number(tmp_path, capsys, picture):
    assert demo(tmp_path, "--json", "--lengths", "64", "32") == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert captured.err == ""
    assert result == json.loads((tmp_path / "demo.json").read_text("utf-8"))
    assert (tmp_path / "demo.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert result["interrupted"] is False
    assert list(result["arms"]) == ["dense", "top-k"]
    for arm in result["arms"].values():
        assert arm["steps_done"] == len(arm["train_loss"]) == 2
        # The untrained model is uniform over the alphabet.
        assert arm["train_loss"][0] == pytest.approx(math.log(result["text"]["alphabet"]), abs=1e-4)
        assert arm["validation"][-1] == {
            "step": 2,
            "nats_per_character": arm["validation_nats_per_character"],
        }
        assert arm["validation_bits_per_character"] == pytest.approx(
            arm["validation_nats_per_character"] / math.log(2)
        )
        assert arm["tokens_per_second"] > 0
    assert result["arms"]["top-k"]["top_k"] == 8
    assert list(result["timing"]["seconds"]) == ["32", "64"]
    for row in result["timing"]["seconds"].values():
        assert all(seconds > 0 for seconds in row.values())
    assert result["timing"]["largest_error_against_plain_pytorch"] < 1e-4
    assert len(result["sample"]["text"]) == 8
    chosen = result["chosen_keys"]["weights"]
    assert all(sum(weight is not None for weight in row) <= 8 for row in chosen)


def test_text_run_prints_tables_and_files(tmp_path, capsys):
    assert demo(tmp_path, "--lengths", "32") == 0
    printed = capsys.readouterr().out
    for part in (
        "validation loss",
        "training speed",
        "peak memory",
        "plain PyTorch",
        "sample",
        "demo.png",
        "demo.json",
    ):
        assert part in printed
    assert "wing" in printed


def test_the_slow_wing_is_announced(tmp_path, capsys):
    with sparse_attn.use_backend("reference"):
        assert demo(tmp_path, "--lengths") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "no compiled kernels here" in printed
    assert "reference wing" in printed


def test_embedding_of_variable_width(tmp_path, capsys, picture):
    assert demo(tmp_path, "--json", "--lengths", "--embedding", "variable") == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["arms"]) == ["dense", "top-k", "top-k + widths"]
    full, ours = (result["arms"][name]["embedding"] for name in ("top-k", "top-k + widths"))
    alphabet = result["text"]["alphabet"]
    assert full["parameters"] == 2 * alphabet * model.WIDTH
    # Half of it, of which a plan uses at least 97 %, tables and projections together.
    assert 0.97 * 0.5 * full["parameters"] <= ours["parameters"] <= 0.5 * full["parameters"]
    assert sum(ours["characters"]) == alphabet
    assert ours["widths"] == sorted(ours["widths"], reverse=True)
    losses = result["arms"]["top-k + widths"]["train_loss"]
    assert losses[0] == pytest.approx(math.log(alphabet), abs=1e-4)
    assert losses[1] < losses[0]


def test_a_text_without_such_widths_is_refused(tmp_path, capsys):
    file = tmp_path / "text.txt"
    file.write_text("ab" * 1000, "utf-8")
    assert demo(tmp_path, "--lengths", "--text", str(file), "--embedding", "variable") == 2
    assert "--embedding variable" in capsys.readouterr().err


def test_no_lengths_no_timing(tmp_path, capsys):
    assert demo(tmp_path, "--json", "--lengths") == 0
    assert json.loads(capsys.readouterr().out)["timing"] is None


def test_same_seed_same_losses(tmp_path, capsys):
    runs = []
    for seed in ("3", "3", "4"):
        assert demo(tmp_path, "--json", "--lengths", "--seed", seed) == 0
        result = json.loads(capsys.readouterr().out)
        runs.append(
            [(arm["train_loss"], arm["validation"]) for arm in result["arms"].values()] + [result["sample"]]
        )
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_steps_are_fitted_to_the_time_and_said(tmp_path, capsys):
    options = [*TINY[2:], "--out", str(tmp_path), "--lengths"]
    assert cli.main(["demo", "--seconds", "1", *options]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    result = json.loads((tmp_path / "demo.json").read_text("utf-8"))
    assert result["steps_fitted"] is True
    assert result["seconds_fitted_to"] == 1
    steps = result["steps"]
    assert steps == result["settings"]["steps"] >= 5
    assert [arm["steps_done"] for arm in result["arms"].values()] == [steps, steps]
    assert f"{steps:,} steps of each model, fitted to 1 s of training. It will take about" in printed
    assert f"--steps {steps} --seed 0 gives these losses again" in printed
    assert cli.main(["demo", "--steps", str(steps), "--json", *options]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["steps_fitted"] is False
    assert [arm["train_loss"] for arm in again["arms"].values()] == [
        arm["train_loss"] for arm in result["arms"].values()
    ]


def test_ctrl_c_before_the_steps_are_known(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pace, "train_step", interrupting(pace.train_step, 1))
    assert cli.main(["demo", *TINY[2:], "--out", str(tmp_path)]) == 130
    assert "Ended by Ctrl-C" in capsys.readouterr().out


def test_own_text_in_any_script(tmp_path, capsys, picture):
    file = tmp_path / "text.txt"
    file.write_text("Съешь ещё этих мягких французских булок, 日本語も.\n" * 40, "utf-8")
    assert demo(tmp_path, "--json", "--lengths", "--text", str(file)) == 0
    assert json.loads(capsys.readouterr().out)["text"]["name"] == "text.txt"


def test_markup_in_the_text_is_printed_as_it_is(tmp_path, capsys):
    file = tmp_path / "text.txt"
    file.write_text("[bold]x[/bold] [/] " * 200, "utf-8")
    assert demo(tmp_path, "--lengths", "--text", str(file)) == 0
    assert "[bold]x[/bold]" in capsys.readouterr().out


def interrupting(function, after: int):
    """`function`, which Ctrl-C hits at its call number `after`."""
    calls = 0

    def call(*args, **kw):
        nonlocal calls
        calls += 1
        if calls == after:
            raise KeyboardInterrupt
        return function(*args, **kw)

    return call


# Calls of train_step: two in each of the two arms.
@pytest.mark.parametrize(("after", "done"), [(1, [0, 0]), (2, [1, 0]), (3, [2, 0]), (4, [2, 1])])
def test_ctrl_c_while_training_keeps_what_is_done(after, done, tmp_path, monkeypatch, capsys, picture):
    monkeypatch.setattr(train, "train_step", interrupting(train.train_step, after))
    assert demo(tmp_path, "--json") == 130
    result = json.loads(capsys.readouterr().out)
    assert result["interrupted"] is True
    assert [arm["steps_done"] for arm in result["arms"].values()] == done
    assert (tmp_path / "demo.png").stat().st_size > 0


def test_ctrl_c_while_training_prints_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "train_step", interrupting(train.train_step, 4))
    assert demo(tmp_path) == 130
    printed = capsys.readouterr().out
    assert "Ended by Ctrl-C" in printed
    assert "1 of 2" in printed


def test_ctrl_c_while_timing_keeps_the_rest(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "_dense", interrupting(timing._dense, 5))
    assert demo(tmp_path, "--json", "--lengths", "16", "32", "64") == 130
    result = json.loads(capsys.readouterr().out)
    assert result["arms"]["top-k"]["steps_done"] == 2
    assert result["sample"]["text"]
    assert result["timing"]["seconds"]["16"]["plain PyTorch"] > 0
    assert "64" not in result["timing"]["seconds"]


def test_kernels_that_disagree_are_not_timed(tmp_path, monkeypatch, capsys):
    right = timing.plain_topk_attention
    monkeypatch.setattr(timing, "plain_topk_attention", lambda *args, **kw: right(*args, **kw) + 0.1)
    assert demo(tmp_path, "--json", "--lengths", "32") == 1
    captured = capsys.readouterr()
    assert "disagree at T=32" in captured.err
    result = json.loads(captured.out)
    assert "disagree" in result["error"]
    assert result["timing"]["seconds"]["32"]["top-k"] is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--top-k", "0"], "--top-k: must be at least 1, got 0"),
        (["--window", "9"], "--window counts toward --top-k and may not pass it, got 9 and 8"),
        (["--top-k", "few"], "--top-k: must be a whole number, got 'few'"),
        (["--steps", "0"], "--steps: must be at least 1, got 0"),
        (["--seconds", "9"], "--seconds: not allowed with argument --steps"),
        (["--context", "1"], "--context: must be at least 2, got 1"),
        (["--lengths", "0"], "--lengths: must be at least 1, got 0"),
        (["--text", "no/such/file.txt"], "--text no/such/file.txt cannot be read: No such file or directory"),
        (["--text", "."], "--text . cannot be read: Is a directory"),
        (["--device", "cuda:99"], "--device cuda:99 is not available here: "),
        (["--device", "abacus"], "--device abacus is not available here: "),
        (["--context", "100000"], "the text has 991,599 characters, and a context of 100000 needs at least"),
    ],
)
def test_bad_options_give_one_sentence(options, sentence, tmp_path, capsys):
    assert demo(tmp_path, *options) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error


def test_short_and_binary_texts(tmp_path, capsys):
    (tmp_path / "short.txt").write_text("too short", "utf-8")
    assert demo(tmp_path, "--text", str(tmp_path / "short.txt")) == 2
    assert "has 9 characters, and a context of 48 needs at least" in capsys.readouterr().err
    (tmp_path / "binary").write_bytes(b"\xff\xfe" * 5000)
    assert demo(tmp_path, "--text", str(tmp_path / "binary")) == 2
    assert "is not UTF-8 text" in capsys.readouterr().err


def test_the_shortest_text_that_is_accepted_works(tmp_path):
    needed = int(49 / text.HELD_OUT) + 1
    (tmp_path / "text.txt").write_text(("ab " * needed)[:needed], "utf-8")
    assert demo(tmp_path, "--lengths", "--text", str(tmp_path / "text.txt")) == 0


def test_out_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert demo(tmp_path / "file" / "sub") == 2
    assert "cannot be written to" in capsys.readouterr().err
