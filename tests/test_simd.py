"""The SIMD layer of instruction sets that this machine need not have, to the bits of the plain one."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ARM = "aarch64-linux-gnu-g++"  # Debian: g++-aarch64-linux-gnu, qemu-user
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")


def lines_of(compiler: str, program: Path, *flags: str, run: tuple[str, ...] = ()) -> list[str]:
    common = ["-std=c++20", "-O2", "-fno-math-errno", "-fno-trapping-math", f"-I{ROOT / 'csrc'}"]
    source = ROOT / "tests" / "simd" / "layer.cpp"
    subprocess.run([compiler, *common, *flags, source, "-o", program], check=True)
    return subprocess.run([*run, program], check=True, capture_output=True, text=True).stdout.splitlines()


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("g++"), reason="needs g++ on x86-64")
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_half_numbers_are_those_of_the_processor(compiler, tmp_path):
    """Every half number, and floats between any two of them, by integers and by the processor's conversion."""
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler}")
    assert lines_of(compiler, tmp_path / "plain") == lines_of("g++", tmp_path / "f16c", "-mf16c")


@pytest.mark.skipif(not (shutil.which(ARM) and QEMU), reason=f"no {ARM} or no qemu-aarch64")
def test_neon(tmp_path):
    """Compiled for 64-bit ARM and run by qemu: NEON's lines are those of four plain floats, there and here."""
    neon = lines_of(ARM, tmp_path / "neon", "-static", run=(QEMU,))
    plain = lines_of(ARM, tmp_path / "plain", "-static", "-DSPARSE_ATTN_PLAIN", run=(QEMU,))
    assert len(neon) > 50_000
    assert neon == plain
    if shutil.which("g++"):
        assert neon == lines_of("g++", tmp_path / "here")
