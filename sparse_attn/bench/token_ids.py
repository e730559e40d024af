"""Token ids of real text: GPT-2's byte-pair encoding of the State of the Union addresses that ship with the package.

The encoding's `encoder.json` and `vocab.bpe` are read from the folder that SPARSE_ATTN_GPT2_BPE names; nothing is
fetched.
"""

from __future__ import annotations

import os
import re
from functools import cache
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

from sparse_attn.files import read_json, read_text, refusal

GPT2_BPE = "SPARSE_ATTN_GPT2_BPE"
FILES = ("encoder.json", "vocab.bpe")
# Letters, digits, the rest and white space, as the original says them with \p{L} and \p{N}.
_PIECES = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")


def problem() -> str | None:
    """None if the encoding is here, else the reason in one clause."""
    folder = os.environ.get(GPT2_BPE)
    if not folder:
        return f"{GPT2_BPE} is not set (a folder with GPT-2's encoder.json and vocab.bpe)"
    missing = [name for name in FILES if not (Path(folder) / name).is_file()]
    return f"{GPT2_BPE} names a folder without {' and '.join(missing)}" if missing else None


def _byte_names() -> dict[int, str]:
    """A printable character for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


def gpt2_tokens() -> list[int]:
    """The ids of the package's text."""
    folder = Path(os.environ[GPT2_BPE])
    number = read_json(folder / "encoder.json", "numbers of tokens")
    merges = read_text(folder / "vocab.bpe", "merges").splitlines()[1:]
    order = {tuple(line.split()): i for i, line in enumerate(merges) if line}
    names = _byte_names()

    @cache
    def encode(piece: str) -> tuple[int, ...]:
        parts = [names[b] for b in piece.encode("utf-8")]
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            best = min(pairs, key=lambda pair: order.get(pair, len(order)))
            if best not in order:
                break
            merged, i = [], 0
            while i < len(parts):
                both = tuple(parts[i : i + 2]) == best
                merged.append("".join(best) if both else parts[i])
                i += 2 if both else 1
            parts = merged
        try:
            return tuple(number[part] for part in parts)
        except (KeyError, TypeError):
            raise refusal(folder / "encoder.json", "numbers of tokens", f"none for {parts}") from None

    text = (files("sparse_attn") / "data" / "state_of_the_union.txt").read_text("utf-8")
    return [token for piece in _PIECES.findall(text) for token in encode(piece)]
