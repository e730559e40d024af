"""The part of the build that pyproject.toml cannot say: the extension and the packages.

The extension is two files in the package, `_C` and the library that it is linked to (tools/native.py says why).

Environment variables:
  SPARSE_ATTN_REQUIRE_EXT=1   fail when the extension cannot be built (else: install pure Python)
  SPARSE_ATTN_PURE=1          do not build it
  SPARSE_ATTN_CUDA=0          leave out the CUDA kernels even where nvcc is found
  SPARSE_ATTN_CUDA_ARCHS=90a  build them for these GPUs ("80,90a"; PTX: "120-virtual"), "all" or "native", those of this
                              machine. Default: all for a wheel, native for an editable or in-place build
  SPARSE_ATTN_SANITIZE=address  build for ASan and UBSan ("thread": for TSan) in a folder of its own, without CUDA, as
                              `make sanitize` does: it loads only where the sanitizer's runtime was loaded first
  SPARSE_ATTN_PROGRESS=file   append a line to it for each thing that was compiled
  SPARSE_ATTN_TORCH=dir       build with the headers of the torch in that folder (`…/site-packages/torch`), not with the
                              environment's own: they are the same for every Python
  MAX_JOBS=4                  parallel compile jobs (default: the number of usable cores)
  CXX, CUDA_HOME              which compiler, which CUDA toolkit
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel as _bdist_wheel
from setuptools.command.build_ext import build_ext as _build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

import isas  # noqa: E402
import native  # noqa: E402
from toolchain import Unavailable, env_flag, find_gpus  # noqa: E402

# What nvcc is asked for, as far as it can. "-virtual" is PTX: that of the newest serves GPUs to come, that of
# 90 serves those between the rows (10.3, 11.0), because code for 100a runs on 10.0 alone.
CUDA_ARCHS = ["80", "86", "89", "90a", "90-virtual", "100a", "120", "120-virtual"]

NOTE = "_no_extension.txt"  # in the installed package: why there is no _C


def cuda_archs(default: str) -> list[str]:
    asked = os.environ.get("SPARSE_ATTN_CUDA_ARCHS", "").strip() or default
    found = []
    for arch in filter(None, re.split(r"[,; ]+", asked)):
        named = {"all": lambda: CUDA_ARCHS, "native": native_archs}.get(arch)
        found += named() if named else [arch.removeprefix("sm_").replace(".", "")]
    return list(dict.fromkeys(found))


def native_archs() -> list[str]:
    """For each GPU of this machine code, or the newest PTX that it takes; none for one older than the first row."""
    found = []
    for gpu in find_gpus():
        code = [arch for arch in CUDA_ARCHS if arch in (gpu, gpu + "a")]
        virtual = [
            arch for arch in CUDA_ARCHS if arch.endswith("-virtual") and int(arch.split("-")[0]) <= int(gpu)
        ]
        found += code or virtual[-1:]
    return found


class build_ext(_build_ext):
    problem: str | None = None
    default_archs = "all"

    def run(self) -> None:
        # A wheel goes to other machines; an editable install stays on this one.
        self.default_archs = "native" if self.inplace else "all"
        super().run()
        # pip hides what a successful build prints, so the package itself keeps the reason (doctor shows it).
        package = ROOT / "sparse_attn" if self.inplace else Path(self.build_lib) / "sparse_attn"
        (package / NOTE).unlink(missing_ok=True)
        if self.problem:
            for name in self.files():
                (package / name).unlink(missing_ok=True)
            package.mkdir(parents=True, exist_ok=True)
            (package / NOTE).write_text(self.problem + "\n")

    def files(self) -> list[str]:
        return [native.LIBRARY, Path(self.get_ext_filename("sparse_attn._C")).name]

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), str(Path(self.build_lib, "sparse_attn", native.LIBRARY))]

    def copy_extensions_to_source(self) -> None:
        # setuptools would write over a module that some process is loading, and knows nothing of the library.
        for name in self.files():
            built = Path(self.build_lib, "sparse_attn", name)
            if built.exists():
                native.replace(built, ROOT / "sparse_attn" / name)

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        for name in self.files():
            target.with_name(name).unlink(missing_ok=True)
        try:
            if env_flag("SPARSE_ATTN_PURE"):
                raise Unavailable("SPARSE_ATTN_PURE=1 was set")
            plan = native.make_plan(isas.of_this_machine(), isas.PARTS, cuda_archs(self.default_archs))
            try:
                native.build(plan, target)
            except Unavailable as error:
                if not plan.nvcc or env_flag("SPARSE_ATTN_REQUIRE_EXT"):
                    raise
                # nvcc refuses many a compiler that is fine for the rest: CPU kernels are better than none.
                self.warn(f"{error}\nTrying again without the CUDA kernels.")
                plan.nvcc, plan.archs, plan.no_cuda = None, [], "nvcc failed on the kernels"
                native.build(plan, target)
        except Unavailable as error:
            if env_flag("SPARSE_ATTN_REQUIRE_EXT"):
                raise SystemExit(f"sparse_attn: SPARSE_ATTN_REQUIRE_EXT=1 is set, but {error}") from None
            self.problem = str(error)
            self.warn(f"sparse_attn: {error}\nInstalling pure Python: it works, without the native kernels.")


class bdist_wheel(_bdist_wheel):
    """Names the wheel by what is in it: py3-none-any when the extension could not be built."""

    def run(self) -> None:
        build = self.get_finalized_command("build")
        shutil.rmtree(build.build_lib, ignore_errors=True)  # or modules that are gone would stay in the wheel
        self.run_command("build_ext")
        if self.get_finalized_command("build_ext").problem:
            self.distribution.ext_modules = []
            self.root_is_pure = True
        super().run()


def packages() -> dict:
    """`triton_kernels/` goes inside sparse_attn: as a top-level name it belongs to another project."""
    found = find_packages(include=["sparse_attn", "sparse_attn.*"])
    if not (ROOT / "triton_kernels").is_dir():
        return {"packages": found}
    nested = find_packages("triton_kernels")
    name = "sparse_attn.triton_kernels"
    return {
        "packages": [*found, name, *(f"{name}.{sub}" for sub in nested)],
        "package_dir": {name: "triton_kernels"},
    }


def listed(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


setup(
    ext_modules=[
        Extension(
            "sparse_attn._C",
            sources=listed("csrc/**/*.cpp", "csrc/**/*.cu"),
            depends=listed("csrc/**/*.h", "csrc/**/*.cuh"),
            optional=True,  # build_ext above decides what a failure means
        )
    ],
    cmdclass={"build_ext": build_ext, "bdist_wheel": bdist_wheel},
    **packages(),
)
