"""The extension as a file: what it needs to load, what it was built for, and where it is installed."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from elftools.elf.elffile import ELFFile
from helpers import gpu_code

SPEC = importlib.util.find_spec("sparse_attn._C")
ROOT = Path(__file__).resolve().parent.parent

needs_extension = pytest.mark.skipif(SPEC is None, reason="sparse_attn was installed without its extension")
needs_elf = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads an ELF file (Linux)")


def build_info() -> dict:
    return importlib.import_module("sparse_attn._C").build_info()


def dynamic_strings(path: Path) -> dict[str, list[str]]:
    """What a shared object needs and where it looks for it."""
    found: dict[str, list[str]] = {"NEEDED": [], "RPATH": [], "RUNPATH": []}
    with path.open("rb") as file:
        for tag in ELFFile(file).get_section_by_name(".dynamic").iter_tags():
            name = tag.entry.d_tag.removeprefix("DT_")
            if name in found:
                found[name].append(getattr(tag, name.lower()))
    return found


def needed_versions(path: Path) -> dict[str, tuple[int, ...]]:
    """The newest version of each library that a shared object asks for: {"GLIBC": (2, 27), …}."""
    found: dict[str, tuple[int, ...]] = {}
    with path.open("rb") as file:
        for _, names in ELFFile(file).get_section_by_name(".gnu.version_r").iter_versions():
            for needed in names:
                library, _, numbers = needed.name.rpartition("_")
                version = tuple(int(n) for n in numbers.split("."))
                found[library] = max(found.get(library, ()), version)
    return found


def exported(path: Path) -> set[str]:
    with path.open("rb") as file:
        symbols = ELFFile(file).get_section_by_name(".dynsym").iter_symbols()
        return {s.name for s in symbols if s.name and s["st_shndx"] != "SHN_UNDEF"}


def sections(path: Path) -> list[str]:
    with path.open("rb") as file:
        return [section.name for section in ELFFile(file).iter_sections()]


def fatbin_targets(data: bytes):
    """(is PTX, compute capability × 10) of each piece of GPU code in a file, from the fat binary headers."""
    start = 0
    while (start := data.find(struct.pack("<IHH", 0xBA55ED50, 1, 16), start)) >= 0:
        end = start + 16 + struct.unpack_from("<Q", data, start + 8)[0]
        start += 16
        while start < end:
            kind, _, header, payload = struct.unpack_from("<HHIQ", data, start)
            yield kind == 1, struct.unpack_from("<I", data, start + 28)[0]
            start += header + payload


@needs_extension
def test_build_info_describes_this_build():
    info = build_info()
    assert re.match(r"(gcc|clang) \d+", info["compiler"])
    assert info["torch_target"] == "2.10"
    assert tuple(int(n) for n in info["torch_headers"].split(".")[:2]) >= (2, 10)
    assert info["isas"][0] in ("generic", "neon")
    assert len(set(info["isas"])) == len(info["isas"])
    if info["cuda"] is None:
        assert info["no_cuda"]
        assert info["cuda_archs"] == []
    else:
        assert re.fullmatch(r"\d+\.\d+", info["cuda"])
        assert info["no_cuda"] == ""
        assert info["cuda_archs"]


@needs_extension
@needs_elf
def test_needs_only_what_every_torch_brings():
    library, module = dynamic_strings(gpu_code.library()), dynamic_strings(Path(SPEC.origin))
    system = {"libstdc++", "libgcc_s", "libc", "libm", "libdl", "librt", "libpthread", "ld-linux-x86-64"}
    system |= {"ld-linux-aarch64"}
    for found, own in (library, "libtorch_cpu"), (module, "libsparse_attn"):
        needed = {name.split(".so")[0] for name in found["NEEDED"]}
        assert own in needed
        assert needed <= system | {own}, f"the extension would not load with every torch: needs {needed}"
    assert library["RPATH"] == library["RUNPATH"] == [], "a search path of the building machine is left in"
    assert module["RPATH"] + module["RUNPATH"] == ["$ORIGIN"]


@needs_extension
@needs_elf
@pytest.mark.parametrize("which", ["library", "module"])
def test_needs_no_newer_system_than_torch_does(which):
    """manylinux_2_28: glibc 2.28 and the libraries of gcc 8, whatever compiled this (csrc/common/old_libraries.cpp)."""
    most = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (8, 0, 0)}
    found = needed_versions(gpu_code.library() if which == "library" else Path(SPEC.origin))
    assert {"GLIBC", "GLIBCXX"} <= found.keys()
    newer = {name: version for name, version in found.items() if version > most[name]}
    assert not newer, f"manylinux_2_28 has {most}"


@needs_extension
@needs_elf
def test_exports_only_what_the_other_half_takes():
    """What stands in for newer libraries, above all, must not be found by anything else in the process."""
    assert exported(Path(SPEC.origin)) == {"PyInit__C"}
    names = exported(gpu_code.library())
    assert names
    assert all(name.startswith("_ZN11sparse_attn") for name in names), names


@needs_extension
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is a CUDA build")
def test_imports_in_a_fresh_process_with_a_torch_without_cuda():
    code = "import torch, sparse_attn._C; print(sparse_attn._C.build_info()['isas'])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert build_info()["isas"][0] in run.stdout


@needs_extension
def test_carries_code_for_the_declared_gpus():
    info = build_info()
    if info["cuda"] is None:
        pytest.skip(f"built without CUDA: {info['no_cuda']}")
    declared = {(a.endswith("-virtual"), int(re.match(r"\d+", a)[0])) for a in info["cuda_archs"]}
    assert set(fatbin_targets(gpu_code.library().read_bytes())) == declared


@needs_extension
@needs_elf
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_a_program_without_python_calls_an_op(tmp_path):
    """The library alone brings schemas and kernels, as a package compiled ahead of time needs them."""
    torch_root, program = Path(torch.__file__).parent, tmp_path / "program"
    include, library = torch_root / "include", torch_root / "lib"
    # Libraries that torch itself needs (of CUDA, say) are found by Python, not here.
    link = [f"-L{library}", "-ltorch_cpu", f"-Wl,-rpath,{library}", "-Wl,--allow-shlib-undefined", "-ldl"]
    source = Path(__file__).with_name("without_python.cpp")
    flags = ["-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", include]
    subprocess.run(["g++", *flags, source, "-o", program, *link], check=True)
    if subprocess.run(["ldd", program], capture_output=True, text=True).stdout.count("not found"):
        pytest.skip("libtorch_cpu needs libraries that only Python finds")
    run = subprocess.run([program, gpu_code.library()], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@needs_extension
@needs_elf
def test_kernels_of_one_instruction_set_run_nothing_at_load_time():
    """A constructor at namespace scope would run on import, on CPUs that lack the instructions, and kill them."""
    objects = [o for isa in build_info()["isas"][1:] for o in ROOT.glob(f"build/native-*/{isa}/*.o")]
    if not objects:
        pytest.skip("the object files are not here (installed from a wheel)")
    guilty = [str(o.relative_to(ROOT)) for o in objects if any(".init_array" in s for s in sections(o))]
    assert not guilty, f"these have constructors that run at load time: {guilty}"


def test_installs_no_name_but_its_own():
    distribution = importlib.metadata.distribution("sparse-attn")
    assert distribution.read_text("top_level.txt").split() == ["sparse_attn"]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no source checkout")
def test_everything_is_in_the_source_distribution():
    """`make release-check` compares file by file; here, that no folder was forgotten."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    folders = {name.split("/")[0] for name in listed.splitlines() if "/" in name}
    grafted = set(re.findall(r"^graft (\w[\w-]*|\.\w+)$", (ROOT / "MANIFEST.in").read_text(), re.MULTILINE))
    assert folders - grafted == {"sparse_attn"}  # setuptools lists the package itself


def test_what_the_makefile_says_is_within_an_extra_is():
    """It does not install those again."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    def within(extra: str) -> set[str]:
        found = set()
        for line in extras[extra]:
            own = re.fullmatch(r"sparse-attn\[(.*)\]", line)
            found |= (
                set().union(*map(within, own[1].split(","))) if own else {re.split(r"[\[<>=; ]", line)[0]}
            )
        return found

    lines = re.findall(r"^WITH_(\w+) := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    said = {extra: names.replace("$(WITH_test)", dict(lines)["test"]).split() for extra, names in lines}
    assert "test" in said["dev"]
    for extra, names in said.items():
        for name in names:
            assert within(name) <= within(extra), f"{extra} does not have all of {name}"
