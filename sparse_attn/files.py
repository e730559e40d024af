"""Files that users name: nothing in them is run, sizes are looked at first, and what does not fit is one sentence.

Every reader raises ValueError, in a sentence that begins with the path, where a file is not what it should be, whatever
is in it; an OSError where it cannot be read at all.
"""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LARGEST_TEXT = 1 << 30  # bytes; the plan of 2^27 tokens has less


def refusal(path: str | os.PathLike, what: str, why: object) -> ValueError:
    """The error that says that a file holds no `what`."""
    return ValueError(f"{path} holds no {what}: {' '.join(str(why).split()) or type(why).__name__}")


def read_text(path: str | os.PathLike, what: str, most: int = LARGEST_TEXT) -> str:
    """The text of a UTF-8 file of at most `most` bytes."""
    with open(path, "rb") as file:
        # Not the size that the system names: a pipe has none, and a file may grow.
        data = file.read(most + 1)
    if len(data) > most:
        raise refusal(path, what, f"it has more than {most:,} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise refusal(path, what, f"it is not UTF-8 text (byte {error.start} is not)") from None


def parse_json(text: str) -> Any:
    """json.loads, whose ValueError also stands for what is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: str | os.PathLike, what: str, most: int = LARGEST_TEXT) -> Any:
    """What a JSON file holds."""
    text = read_text(path, what, most)
    try:
        return parse_json(text)
    except ValueError as error:
        raise refusal(path, what, f"it is not valid JSON: {error}") from None


def read_tensors(path: str | os.PathLike, what: str) -> Any:
    """What `torch.save` wrote: tensors, on the CPU, and plain data. Nothing else is unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            stored = sum(entry.file_size for entry in archive.infolist())
    except zipfile.BadZipFile:
        raise refusal(path, what, "it is no file of torch.save, or not all of one") from None
    if stored > os.path.getsize(path):  # torch.save compresses nothing
        raise refusal(path, what, f"its {os.path.getsize(path):,} bytes would become {stored:,}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # there is no end to what a broken or a hostile file can raise in there
        why = " ".join(str(error).split())
        raise refusal(path, what, why if len(why) <= 200 else f"{why[:197]}...") from None


def stored(name: str, tensor: Tensor) -> Tensor:
    """The tensor, each of whose elements must be in memory: a file may claim any shape for a single number."""
    claimed = tensor.numel() * tensor.element_size()
    if tensor.device.type != "meta" and tensor.layout == torch.strided:
        held = tensor.untyped_storage().nbytes()
        if claimed > held:
            raise ValueError(f"{name} claims {claimed:,} bytes and holds {held:,}")
    return tensor


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a UTF-8 file whole or, where it fails or is interrupted, leaves what was there before."""
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():  # a pipe, a terminal
        target.write_text(text, "utf-8")
        return
    beside = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        beside.write_text(text, "utf-8")
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
