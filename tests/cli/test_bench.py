"""`sparse-attn bench`: a shape of one's own and the standard tables, from the command line to the files."""

from __future__ import annotations

import json

import pytest

from sparse_attn.bench import contenders, registry
from sparse_attn.bench.attention import AttentionCase
from sparse_attn.bench.registry import Comparison
from sparse_attn.cli import bench, checkout, main, study

pytestmark = pytest.mark.torch_defaults
pytest.importorskip("rich")
pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def _without_flex(monkeypatch):
    monkeypatch.setattr(contenders, "flex_problem", lambda: "it is left out of this test")


def test_a_shape_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["bench", "--shape", "1,4/2,40,72,16", "--top-k", "8,4", "--dtype", "float32,bfloat16"]
    assert main([*command, "--json", "--out", "found"]) == 0
    results = json.loads(capsys.readouterr().out)
    measured = {
        (r["case"]["dtype"], r["case"]["direction"], r["case"]["query_length"]) for r in results["headline"]
    }
    queries = (("forward", 40), ("both", 40), ("forward", 1))
    assert measured == {(dtype, *rest) for dtype in ("float32", "bfloat16") for rest in queries}
    assert all({"sdpa", "plain_tuned"} <= set(row["rivals"]) for row in results["headline"])
    assert len(results["verdict"]) == 2
    assert json.loads((tmp_path / "found" / "own_shape_cpu.json").read_text()) == results
    assert (tmp_path / "found" / "own_shape_cpu.png").stat().st_size > 10_000


def test_nothing_is_written_without_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--shape", "1,2,16,16,8", "--top-k", "4", "--no-causal"]) == 0
    out = capsys.readouterr().out
    assert "not causal" in out
    assert "At this shape in float32" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "1,8,64"], "--shape takes B,Hq/Hkv,Tq,Tk,D, whole numbers from 1 on"),
        (["--shape", "0,8,64,64,64"], "got '0,8,64,64,64'"),
        (["--shape", "1,8/3,64,64,64"], "--shape: Hq must be a multiple of Hkv, got 8/3"),
        (["--shape", "1,8,64,64,512"], "--shape: D can be 256 at most, got 512"),
        (["--shape", "1,8,65,64,64"], "got Tq=65 and Tk=64 (--no-causal takes any)"),
        (
            ["--shape", "1,8,64,64,64", "--top-k", "8,none"],
            "--top-k takes a list with commas, whole numbers from 1 on",
        ),
        (
            ["--shape", "1,8,64,64,64", "--dtype", "int8"],
            "--dtype takes a list with commas, of float32, bfloat16",
        ),
        (["--shape", "1,8,64,64,64", "--quick"], "--quick does not go with --shape"),
        (["--top-k", "8"], "--top-k needs --shape"),
        (["--no-causal"], "--causal needs --shape"),
        (["--suite", "widths", "--op", "topk_select"], "--suite and --op exclude each other"),
        (["--threads", "0"], "--threads: must be at least 1, got 0"),
    ],
)
def test_bad_options_are_one_sentence(options, message, capsys):
    assert main(["bench", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.fixture
def tiny(monkeypatch):
    """An attention suite of one small row."""
    op = registry.op("topk_attention")
    case = AttentionCase("topk_attention", 64, heads=2, kv_heads=2, head_dim=16)
    rows = [Comparison(case, ("sdpa", "plain"), {"plain": 1e-9})]
    monkeypatch.setattr(type(op), "comparisons", lambda self, quick: rows)
    for name in ("scaling", "peaks", "overhead"):
        monkeypatch.setattr(type(op), name, getattr(registry.Op, name))
    return op


def test_the_standard_table_in_an_installed_package(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "checkout", lambda: None)
    assert main(["bench", "--op", "topk_attention", "--quick"]) == 0
    assert "1 of 1 targets met" in capsys.readouterr().out
    results = json.loads((tmp_path / "sparse_attn_bench" / "topk_attention_cpu.json").read_text())
    assert results["machine"]["command"].startswith("sparse-attn bench --op topk_attention --quick --threads")
    assert {"headline", "real", "know_before_use", "scaling", "overhead", "memory", "left_out"} <= set(
        results
    )
    assert (tmp_path / "sparse_attn_bench" / "topk_attention_cpu.png").stat().st_size > 10_000


def test_a_wrong_result_ends_the_run(tiny, tmp_path, monkeypatch, capsys):
    def wrong(*_):
        raise registry.WrongResult("ours: output")

    monkeypatch.setattr(type(tiny), "check", wrong)
    assert main(["bench", "--op", "topk_attention", "--out", str(tmp_path / "found")]) == 1
    assert "Nothing was reported" in capsys.readouterr().err
    assert not (tmp_path / "found").exists()


def test_only_the_packages_own_source_tree_counts(tmp_path, monkeypatch, capsys):
    """Not the current folder's, which may be another version, nor another project's `benchmarks` beside the package."""
    for folder in (tmp_path / "cwd", tmp_path / "site"):
        (folder / "benchmarks" / "studies").mkdir(parents=True)
        (folder / "benchmarks" / "studies" / "__init__.py").touch()
        (folder / "sparse_attn").mkdir()
    (tmp_path / "cwd" / "pyproject.toml").write_text('name = "sparse-attn"\n')
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(checkout, "PACKAGE", tmp_path / "site" / "sparse_attn")
    assert study.checkout() is None
    assert main(["study", "cost", "--quick"]) == 2
    error = capsys.readouterr().err
    assert "git clone" in error
    assert len(error.splitlines()) == 1
    monkeypatch.setattr(checkout, "PACKAGE", tmp_path / "cwd" / "sparse_attn")
    assert study.checkout() == tmp_path / "cwd"
