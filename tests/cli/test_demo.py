"""`sparse-attn demo`: a run of a few steps, its JSON and picture, Ctrl-C, and bad options."""

import json
import math
from pathlib import Path

import pytest
import torch

import sparse_attn
from sparse_attn import cli
from sparse_attn.cli import demo_memory, demo_model, demo_text, demo_timing, demo_train

TINY = ["--steps", "2", "--context", "48", "--batch", "2", "--top-k", "8", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _quick(request, monkeypatch):
    """A small validation set, a short sample, one repetition in the timing, and no picture unless asked for."""
    if "picture" not in request.fixturenames:
        monkeypatch.setattr("sparse_attn.cli.demo.draw", lambda *what: None)
    monkeypatch.setattr(demo_text, "WINDOWS", 4)
    monkeypatch.setattr("sparse_attn.cli.demo.SAMPLE_LENGTH", 8)
    monkeypatch.setattr(demo_timing, "ROUNDS", 1)


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
    text = capsys.readouterr().out
    for part in (
        "validation loss",
        "training speed",
        "peak memory",
        "plain PyTorch",
        "sample",
        "demo.png",
        "demo.json",
    ):
        assert part in text
    assert "wing" in text


def test_the_slow_wing_is_announced(tmp_path, capsys):
    with sparse_attn.use_backend("reference"):
        assert demo(tmp_path, "--lengths") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "no compiled kernels here" in text
    assert "reference wing" in text


def test_embedding_of_variable_width(tmp_path, capsys, picture):
    assert demo(tmp_path, "--json", "--lengths", "--embedding", "variable") == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["arms"]) == ["dense", "top-k", "top-k + widths"]
    full, ours = (result["arms"][name]["embedding"] for name in ("top-k", "top-k + widths"))
    alphabet = result["text"]["alphabet"]
    assert full["parameters"] == 2 * alphabet * demo_model.WIDTH
    # Half of it, of which a plan uses at least 97 %, tables and projections together.
    assert 0.97 * 0.5 * full["parameters"] <= ours["parameters"] <= 0.5 * full["parameters"]
    assert sum(ours["characters"]) == alphabet
    assert ours["widths"] == sorted(ours["widths"], reverse=True)
    losses = result["arms"]["top-k + widths"]["train_loss"]
    assert losses[0] == pytest.approx(math.log(alphabet), abs=1e-4)
    assert losses[1] < losses[0]


def test_a_text_without_such_widths_is_refused(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("ab" * 1000, "utf-8")
    assert demo(tmp_path, "--lengths", "--text", str(text), "--embedding", "variable") == 2
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


def test_own_text_in_any_script(tmp_path, capsys, picture):
    text = tmp_path / "text.txt"
    text.write_text("Съешь ещё этих мягких французских булок, 日本語も.\n" * 40, "utf-8")
    assert demo(tmp_path, "--json", "--lengths", "--text", str(text)) == 0
    assert json.loads(capsys.readouterr().out)["text"]["name"] == "text.txt"


def test_markup_in_the_text_is_printed_as_it_is(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("[bold]x[/bold] [/] " * 200, "utf-8")
    assert demo(tmp_path, "--lengths", "--text", str(text)) == 0
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


# Calls of train_step: one of warm-up, then two, in each of the two arms.
@pytest.mark.parametrize(("after", "done"), [(1, [0, 0]), (3, [1, 0]), (5, [2, 0]), (6, [2, 1])])
def test_ctrl_c_while_training_keeps_what_is_done(after, done, tmp_path, monkeypatch, capsys, picture):
    monkeypatch.setattr(demo_train, "train_step", interrupting(demo_train.train_step, after))
    assert demo(tmp_path, "--json") == 130
    result = json.loads(capsys.readouterr().out)
    assert result["interrupted"] is True
    assert [arm["steps_done"] for arm in result["arms"].values()] == done
    assert (tmp_path / "demo.png").stat().st_size > 0


def test_ctrl_c_while_training_prints_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_train, "train_step", interrupting(demo_train.train_step, 6))
    assert demo(tmp_path) == 130
    text = capsys.readouterr().out
    assert "Ended by Ctrl-C" in text
    assert "1 of 2" in text


def test_ctrl_c_while_timing_keeps_the_rest(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_timing, "_dense", interrupting(demo_timing._dense, 3))
    assert demo(tmp_path, "--json", "--lengths", "16", "32", "64") == 130
    result = json.loads(capsys.readouterr().out)
    assert result["arms"]["top-k"]["steps_done"] == 2
    assert result["sample"]["text"]
    assert result["timing"]["seconds"]["16"]["plain PyTorch"] > 0
    assert "64" not in result["timing"]["seconds"]


def test_kernels_that_disagree_are_not_timed(tmp_path, monkeypatch, capsys):
    right = demo_timing.plain_topk_attention
    monkeypatch.setattr(demo_timing, "plain_topk_attention", lambda *args, **kw: right(*args, **kw) + 0.1)
    assert demo(tmp_path, "--json", "--lengths", "32") == 1
    captured = capsys.readouterr()
    assert "disagree at T=32" in captured.err
    result = json.loads(captured.out)
    assert "disagree" in result["error"]
    assert result["timing"]["seconds"]["32"]["top-k"] is None


def test_what_is_too_big_or_too_long_is_skipped_with_its_reason(monkeypatch):
    monkeypatch.setattr(demo_timing, "TOO_BIG", 4 * demo_timing.HEADS * 32 * 32)
    monkeypatch.setattr(demo_timing, "TOO_LONG", 0.0)
    device = torch.device("cpu")
    timing = demo_timing.start(8, device)
    list(demo_timing.measure(timing, [32, 64], device, 0))
    assert all(timing.seconds[32].values())
    assert not any(timing.seconds[64].values())
    assert "score matrix" in timing.skipped["plain PyTorch at T=64"]
    assert "would take" in timing.skipped["SDPA at T=64"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--top-k", "0"], "--top-k: must be at least 1, got 0"),
        (["--window", "9"], "--window counts toward --top-k and may not pass it, got 9 and 8"),
        (["--top-k", "few"], "--top-k: must be a whole number, got 'few'"),
        (["--steps", "0"], "--steps: must be at least 1, got 0"),
        (["--context", "1"], "--context: must be at least 2, got 1"),
        (["--lengths", "0"], "--lengths: must be at least 1, got 0"),
        (["--text", "no/such/file.txt"], "--text no/such/file.txt cannot be read: No such file or directory"),
        (["--text", "."], "--text . cannot be read: Is a directory"),
        (["--device", "cuda:99"], "--device cuda:99 is not available here: "),
        (["--device", "abacus"], "--device abacus is not available here: "),
        (["--context", "100000"], "the text has 991,599 characters, and --context 100000 needs at least"),
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
    assert "has 9 characters, and --context 48 needs at least" in capsys.readouterr().err
    (tmp_path / "binary").write_bytes(b"\xff\xfe" * 5000)
    assert demo(tmp_path, "--text", str(tmp_path / "binary")) == 2
    assert "is not UTF-8 text" in capsys.readouterr().err


def test_the_shortest_text_that_is_accepted_works(tmp_path):
    needed = int(49 / demo_text.HELD_OUT) + 1
    (tmp_path / "text.txt").write_text(("ab " * needed)[:needed], "utf-8")
    assert demo(tmp_path, "--lengths", "--text", str(tmp_path / "text.txt")) == 0


def test_out_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert demo(tmp_path / "file" / "sub") == 2
    assert "cannot be written to" in capsys.readouterr().err


def test_held_out_text_is_the_last_tenth():
    corpus = demo_text.load(None, 256)
    total = len(corpus.train) + len(corpus.held_out)
    assert len(corpus.held_out) == total // 10
    assert total > 900_000
    assert "Thomas Jefferson, 1801" in corpus.decode(corpus.train[-5000:])
    assert corpus.encode("Union") == [corpus.alphabet.index(c) for c in "Union"]


def test_the_two_arms_start_equal_and_agree_when_every_key_is_kept():
    ids = torch.randint(0, 20, (2, 32))
    models = []
    for top_k in (None, 32, 4):
        torch.manual_seed(0)
        model = demo_model.GPT(20, 32, top_k)
        torch.manual_seed(1)
        for parameter in model.parameters():  # the output matrices start at zero, which would hide everything
            torch.nn.init.normal_(parameter, std=0.1)
        models.append(model)
    dense, all_keys, few_keys = (model(ids) for model in models)
    torch.testing.assert_close(dense, all_keys, rtol=1e-4, atol=1e-4)
    assert (dense - few_keys).abs().max() > 1e-3


def test_plain_topk_attention_with_all_keys_is_dense_attention():
    query, key, value = (torch.randn(1, 2, 24, 8) for _ in range(3))
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(demo_timing.plain_topk_attention(query, key, value, 24), dense)


def test_peak_memory_sees_what_was_freed_again():
    memory = demo_memory.PeakMemory(torch.device("cpu"))
    if memory.peak() is None:
        pytest.skip("this system has no high-water mark that can be set back")
    torch.ones(50_000_000)  # 200 MB
    assert 150e6 < memory.peak() < 400e6
    assert demo_memory.PeakMemory(torch.device("cpu")).peak() < 100e6
