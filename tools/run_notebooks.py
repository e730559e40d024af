"""Executes the notebooks of examples/notebooks on small settings, and says which cell failed.

python tools/run_notebooks.py [NAME …]          what they print is not kept: the files have no outputs
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "notebooks"


def main() -> int:
    os.environ.update(SPARSE_ATTN_SMALL="1", MPLBACKEND="module://matplotlib_inline.backend_inline")
    failed = []
    for path in sorted(FOLDER.glob("*.ipynb")):
        if sys.argv[1:] and path.stem not in sys.argv[1:]:
            continue
        notebook = nbformat.read(path, as_version=4)
        if any(cell.get("outputs") for cell in notebook.cells):
            failed.append(f"{path.name} has outputs: clear them")
        start = time.perf_counter()
        # In an empty folder: a notebook may not lean on the checkout.
        with tempfile.TemporaryDirectory() as scratch:
            client = NotebookClient(
                notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": scratch}}
            )
            try:
                client.execute()
                print(f"{path.name}: ok, {time.perf_counter() - start:.0f} s", flush=True)
            except CellExecutionError as error:
                failed.append(f"{path.name}: {error}")
    print("\n".join(failed) or "notebooks: all ran")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
