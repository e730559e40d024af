"""Lays out build/hub, which Hugging Face's kernel-builder builds and `kernels` loads, from the package's own sources.

python tools/hub.py [FOLDER]        into FOLDER instead

A kernel of the hub is loaded from any path, beside other versions of itself and an installed package. So here imports
are relative, and the ops are registered in a namespace of their own, named by what the sources hold. Compiled kernels
are in the wheels; this has those of Triton and the definitions in plain PyTorch. `build/torch-<backend>` is what
kernel-builder makes of it, so that `kernels.get_local_kernel` loads the folder as it is.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HUB = Path(sys.argv[1]) if sys.argv[1:] else ROOT / "build" / "hub"
NAME = "sparse_attn"
APART = ("cli", "demo", "bench", "distillation", "data")  # programs, and what they bring
BACKENDS = ("cpu", "cuda", "rocm", "xpu")


def sources() -> dict[str, str]:
    """Path in the kernel's package → text."""
    found = {}
    for path in sorted((ROOT / NAME).rglob("*.py")):
        place = path.relative_to(ROOT / NAME)
        if place.parts[0] not in (*APART, "__main__.py"):
            found[place.as_posix()] = path.read_text("utf-8")
    for path in sorted((ROOT / "triton_kernels").rglob("*.py")):
        found[f"triton_kernels/{path.relative_to(ROOT / 'triton_kernels').as_posix()}"] = path.read_text(
            "utf-8"
        )
    return found


def relative(place: str, text: str, namespace: str) -> str:
    """The text with relative imports, and with names that follow the package to wherever it is loaded."""
    up = "." * place.count("/") + "."  # from the module to the package's top

    def import_of(match: re.Match) -> str:
        return f"{match[1]}from {up}{match[2] or ''} import "

    text = re.sub(rf"^(\s*)from {NAME}(?:\.([\w.]+))? import ", import_of, text, flags=re.MULTILINE)
    # Names in strings: what is imported by name is beside this module, whatever the package is called.
    top = (
        f"__name__.rsplit('.', {place.count('/') + 1})[0]"
        if not place.endswith("__init__.py")
        else "__name__"
    )
    text = re.sub(rf'import_module\("{NAME}\.([\w.]+)"\)', rf'import_module({top} + ".\1")', text)
    text = re.sub(rf'^PACKAGE = "{NAME}\.([\w.]+)"', rf'PACKAGE = {top} + ".\1"', text, flags=re.MULTILINE)
    text = text.replace(f'error.name != "{NAME}._C"', f'error.name != {top} + "._C"')
    text = re.sub(rf'^NAMESPACE = "{NAME}"', f'NAMESPACE = "{namespace}"', text, flags=re.MULTILINE)
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        if any(name.split(".")[0] == NAME for name in names):
            raise SystemExit(f"hub: {place}, line {node.lineno}: this import was not made relative")
    return text


def main() -> int:
    files = sources()
    digest = hashlib.sha256(
        "".join(f"{place}\0{text}\0" for place, text in files.items()).encode()
    ).hexdigest()
    namespace = f"{NAME}_{digest[:8]}"
    shutil.rmtree(HUB, ignore_errors=True)
    made = {place: relative(place, text, namespace) for place, text in files.items()}
    variants = {backend: HUB / "build" / f"torch-{backend}" for backend in BACKENDS}
    folders = [HUB / "torch-ext" / NAME, *variants.values()]
    for folder in folders:
        for place, text in made.items():
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / place).write_text(text, "utf-8")
    for backend, folder in variants.items():
        about = {
            "name": NAME.replace("_", "-"),
            "id": f"{namespace}_{backend}",
            "version": 1,
            "license": "MIT",
        }
        about |= {"python-depends": [], "backend": {"type": backend}}
        (folder / "metadata.json").write_text(json.dumps(about, indent=2) + "\n")
    for name in ("build.toml", "LICENSE"):
        shutil.copy2(ROOT / name, HUB)
    print(f"hub: {len(made)} files in {HUB}, ops in the namespace {namespace}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
