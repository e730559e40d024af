"""benchmarks/gpu_check.sh where no GPU is: every path through it but the timing, interpreted, on tiny shapes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_attn.wings import triton as triton_wing

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"

pytestmark = [
    pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed"),
    pytest.mark.skipif(triton_wing.version is None, reason="Triton is not installed"),
    pytest.mark.skipif(triton_wing.interpreted, reason="this session interprets already"),
]


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {n: v for n, v in os.environ.items() if n != "OUT"} | {
        "PYTHON": sys.executable,
        **variables,
    }
    return subprocess.run(
        [str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=500
    )


def test_help():
    done = run("--help")
    assert done.returncode == 0
    assert "gpu_check.sh [build-and-bench|test|build|bench|sanitize]" in done.stdout
    assert "set -uo" not in done.stdout


def test_unknown_argument():
    done = run("everything")
    assert done.returncode == 2
    assert "unknown argument everything" in done.stderr


def test_it_wants_a_command():
    done = run()
    assert done.returncode == 2
    assert "build-and-bench, then test" in done.stderr


@pytest.mark.slow
def test_dry_run(tmp_path):
    """All steps; the files go to $OUT, and every contender of ours computed the right thing."""
    for command in ("test", "build-and-bench"):
        done = run(command, "--dry-run", OUT=str(tmp_path))
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    results = json.loads((tmp_path / "gpu_dry_run.json").read_text())
    assert results["errors"] == {}
    assert results["tests"]["tests_dry_run"]["total"]["passed"] > 0
    ours = [r for r in results["rows"] if r["contender"].startswith("ours")]
    assert {r["section"] for r in ours} == {
        *("gathered_attention", "topk_attention", "topk_select", "block_attention", "cheap_selection"),
        *("embedding", "loss", "memory", "first_call", "serving"),
    }
    assert not [r for r in ours if r.get("error")]
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "gpu_dry_run.png").stat().st_size > 1000
    assert not list(tmp_path.glob("*.jsonl")), "the rows are in the JSON"
    assert str(tmp_path) not in json.dumps(results), "a folder of this machine is in the results"


def test_ratios_and_targets():
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks.gpu import report as gpu
        from benchmarks.gpu.timing import ratios
    finally:
        sys.path.remove(str(ROOT))
    base = {"section": "gathered_attention", "case": "H16/1 D128 random", "direction": "forward"}
    rows = [
        {**base, "contender": "ours", "ms": 2.0},
        {**base, "contender": "sdpa_flash", "ms": 10.0},
        {**base, "contender": "sdpa_cudnn", "error": "no such kernel"},
        {"section": "ceilings", "case": "", "direction": "forward", "contender": "copy", "gigabytes_per_s": 100.0},
        {"section": "embedding", "case": "bfloat16", "direction": "forward", "contender": "ours", "ms": 1.0,
         "gigabytes_per_s": 80.0},
    ]  # fmt: skip
    ratios(rows)
    assert rows[1]["times_ours"] == 5.0
    found = gpu.against_targets(rows)
    assert [(t["rival"], t["times_ours"], t["reached"]) for t in found] == [
        ("sdpa_flash", 5.0, False),
        ("copy bandwidth (share of)", 0.8, True),
    ]
    assert gpu.slug("NVIDIA H100 80GB HBM3") == "gpu_nvidia_h100_80gb_hbm3"
    text = gpu.table({"rows": rows, "errors": {"loss": "stopped after 90 s"}, "targets": found})
    assert "NOT reached" in text
    assert "loss: stopped after 90 s" in text


def test_tests_that_fail_are_shown(tmp_path):
    """The runner of the test files: a failure is an exit status and its text; a missing package leaves a file out."""
    bad = tmp_path / "test_bad.py"
    bad.write_text("def test_bad():\n    assert 1 == 2, 'two and one'\n")
    code = f"""
import sys
from pathlib import Path
from benchmarks.gpu import tests as gpu_tests
gpu_tests.ROOT = Path({str(tmp_path)!r})
gpu_tests.OPTIONAL = ("a_package_that_is_not_here",)
(gpu_tests.ROOT / "tests").mkdir()
bad = gpu_tests.ROOT / "tests" / "test_bad.py"
bad.write_text(Path({str(bad)!r}).read_text())
other = bad.with_name("test_other.py")
other.write_text("import a_package_that_is_not_here")
sys.argv = ["gpu_tests", "--jobs", "1", str(bad), str(other)]
sys.exit(gpu_tests.main())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "two and one" in done.stdout
    assert "left_out=a_package_that_is_not_here not installed" in done.stdout
    assert "'failed': 1" in done.stdout
