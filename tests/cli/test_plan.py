"""`sparse-attn plan`: sources of counts, table, JSON, files, and bad options."""

import argparse
import json
import subprocess
import sys

import numpy
import pytest
import torch

from sparse_attn import WidthPlan, cli, plan_widths
from sparse_attn.cli.plan import number_of_parameters

COUNTS = (1e6 / numpy.arange(1, 3001)).astype(numpy.int64)[::-1].copy()


@pytest.fixture
def counts(tmp_path):
    numpy.save(tmp_path / "counts.npy", COUNTS)
    return str(tmp_path / "counts.npy")


def plan(*options: str) -> int:
    return cli.main(["plan", *options])


def test_prints_the_plan_and_writes_its_files(counts, tmp_path, capsys):
    out, plot = tmp_path / "plan.json", tmp_path / "plan.png"
    assert (
        plan("--counts", counts, "--dim", "64", "--budget", "50K", "--out", str(out), "--plot", str(plot))
        == 0
    )
    text = " ".join(capsys.readouterr().out.split())
    want = plan_widths(COUNTS, 64, budget=50_000)
    assert WidthPlan.from_json(out) == want
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for part in ("share of occurrences", "counts.npy", f"{want.num_parameters():,}", "50,000", "lagrange"):
        assert part in text
    for width, size in zip(want.widths, want.band_sizes, strict=True):
        assert str(width) in text
        assert f"{size:,}" in text


def test_json_is_all_that_is_printed(counts, capsys):
    assert (
        plan("--counts", counts, "--dim", "64", "--ratio", "0.3", "--json", "--rule", "mass", "--bands", "3")
        == 0
    )
    captured = capsys.readouterr()
    assert captured.err == ""
    report = json.loads(captured.out)
    want = plan_widths(COUNTS, 64, ratio=0.3, rule="mass", num_bands=3)
    assert [band["width"] for band in report["bands"]] == list(want.widths)
    assert [band["tokens"] for band in report["bands"]] == list(want.band_sizes)
    assert (
        sum(band["parameters"] for band in report["bands"])
        == report["num_parameters"]
        == want.num_parameters()
    )
    assert sum(band["share"] for band in report["bands"]) == pytest.approx(1)
    assert 0.97 <= report["budget_used"] <= 1
    assert report["budget"] == int(0.3 * 3000 * 64)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_counts_the_tokens_of_a_file(dtype, tmp_path, capsys):
    ids = numpy.repeat(numpy.arange(200), numpy.arange(200, 0, -1))
    ids.astype(dtype).tofile(tmp_path / "train.bin")
    common = ["--tokens", str(tmp_path / "train.bin"), "--dtype", dtype, "--dim", "32", "--ratio", "0.5"]
    assert plan(*common, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["occurrences"] == len(ids)
    assert report["num_embeddings"] == 200
    assert plan(*common, "--json", "--vocab-size", "256") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_embeddings"] == 256
    assert report["tokens_that_never_occur"] == 56
    assert plan(*common) == 0
    assert "--vocab-size" in capsys.readouterr().out
    assert plan(*common, "--vocab-size", "100") == 2
    assert "is not below vocab_size=100" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.txt", "5\n0\n2.5\n"),
        ("c.json", "[5, 0, 2.5]"),
        ("c.json", '{"2": 2.5, "0": 5}'),
    ],
)
def test_files_of_counts(name, content, tmp_path, capsys):
    (tmp_path / name).write_text(content)
    assert (
        plan("--counts", str(tmp_path / name), "--dim", "4", "--budget", "12", "--json", "--vocab-size", "3")
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert report["num_embeddings"] == 3
    assert report["occurrences"] == 7.5
    assert report["tokens_that_never_occur"] == 1


def test_multiples(counts, capsys):
    assert plan("--counts", counts, "--dim", "64", "--ratio", "0.5", "--multiple-of", "16", "--json") == 0
    assert all(band["width"] % 16 == 0 for band in json.loads(capsys.readouterr().out)["bands"])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("10M", 10_000_000),
        ("1.5K", 1500),
        ("1.5k", 1500),
        ("250000", 250_000),
        ("250_000", 250_000),
        ("2B", 2 * 10**9),
    ],
)
def test_numbers_of_parameters(text, number):
    assert number_of_parameters(text) == number


@pytest.mark.parametrize("text", ["", "0", "-5", "M", "10X", "1e6x", "0.1", "ten"])
def test_not_numbers_of_parameters(text):
    with pytest.raises(argparse.ArgumentTypeError, match="such as 10M"):
        number_of_parameters(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dim", "64"], "--budget --ratio is required"),
        (["--dim", "64", "--budget", "10X"], "such as 10M or 1.5K, got '10X'"),
        (["--dim", "64", "--budget", "1M", "--ratio", "1"], "not allowed with"),
        (["--dim", "0", "--budget", "1M"], "--dim: must be at least 1, got 0"),
        (["--dim", "64", "--budget", "1K"], "at least 24,512 parameters"),
        (["--dim", "64", "--ratio", "4"], "give ratio=1/4"),
        (["--dim", "64", "--ratio", "1", "--rule", "best"], "invalid choice: 'best'"),
        (["--dim", "64", "--ratio", "1", "--vocab-size", "9"], "3,000 entries, more than --vocab-size 9"),
        (["--dim", "64", "--ratio", "1", "--out", "no/such/folder.json"], "no such folder"),
        (["--dim", "64", "--ratio", "1", "--plot", "plan.nonsense"], "cannot write a file"),
    ],
)
def test_bad_options_are_one_sentence(options, message, counts, capsys):
    assert plan("--counts", counts, *options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert error.startswith("sparse-attn plan:")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.npy", b"nothing", "holds no counts"),
        ("c.txt", b"1 two", "holds no counts"),
        ("c.txt", b"", "one number per token"),
        ("c.txt", b"1\n-1\n", "not negative, got -1 for token 1"),
        ("c.json", b"{", "holds no counts"),
        ("c.json", b'{"a": 1}', "holds no counts"),
        ("c.json", b'{"-1": 1}', "token ids"),
        ("c.json", b'["a"]', "one number per token"),
        ("c.json", b"[[1], [2]]", "one number per token"),
        ("c.csv", b"1", ".npy, .txt and .json"),
        (None, b"", "cannot be read: No such file"),
    ],
)
def test_bad_files_of_counts(name, content, message, tmp_path, capsys):
    if name:
        (tmp_path / name).write_bytes(content)
    assert plan("--counts", str(tmp_path / (name or "none.npy")), "--dim", "4", "--ratio", "1") == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_file_of_tokens_that_is_none(tmp_path, capsys):
    assert plan("--tokens", str(tmp_path / "none.bin"), "--dim", "4", "--ratio", "1") == 2
    assert "cannot be read" in capsys.readouterr().err
    (tmp_path / "odd.bin").write_bytes(b"abc")
    assert plan("--tokens", str(tmp_path / "odd.bin"), "--dim", "4", "--ratio", "1") == 2
    assert "whole ids of 2 bytes" in capsys.readouterr().err


def test_json_needs_neither_rich_nor_matplotlib(counts):
    code = (
        "import sys; from sparse_attn.cli import main; "
        f"assert main(['plan', '--counts', {counts!r}, '--dim', '64', '--ratio', '0.5', '--json']) == 0; "
        "assert not {'rich', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_picture_of_any_plan(tmp_path):
    from sparse_attn.cli.plan_plot import draw

    draw(tmp_path / "a.png", WidthPlan(8, [8, 4, 2], [0, 2, 0]), numpy.zeros(3), "nothing $x_")
    draw(tmp_path / "b.png", WidthPlan(8, [8], torch.zeros(1, dtype=torch.int32)), numpy.ones(1), "one")
    assert (tmp_path / "b.png").stat().st_size > 1000
