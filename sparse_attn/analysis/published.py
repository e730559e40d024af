"""The figures that these ideas were first published with, recomputed from the formulas that give them.

Kept so that a reader can see where a number comes from, and what it left out. None of them was measured; what is, is
in docs/findings.md. The proposal: a KeySelector and a HeadApproximator per head instead of attention, and "bespoke"
token dimensions, three bands of an embedding with widths of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

# (model width, length) of the published tables; heads are 64 wide. The row called 2048d was computed with width 1280.
README_SIZES = ((128, 64), (256, 128), (512, 256), (768, 512), (1024, 1024), (1280, 2048))
SCRIPT_SIZES = (*README_SIZES, (2048, 4096))
HEAD_DIM, HIDDEN, TOP_K = 64, 128, 8


@dataclass(frozen=True)
class Figure:
    """A published number beside the one that its formula gives.

    `tolerance` is how far apart they may be: half a unit of the last published digit where the formula is known.
    """

    table: str
    label: str
    published: float
    computed: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        return abs(self.published - self.computed) <= self.tolerance


def one_head(length: int) -> int:
    """Products per token of one head's two networks: D·h + h·T to choose, k·D·h + h·D for the output."""
    return HIDDEN * (HEAD_DIM + length + TOP_K * HEAD_DIM + HEAD_DIM)


def readme_ratio(width: int, length: int) -> float:
    """2 T d over the networks of ONE head: dense attention of all heads against the replacement of one."""
    return 2 * length * width / one_head(length)


def script_ratio(width: int, length: int) -> float:
    """The same two costs, each with the four projections 4 d², and 3 operations of the softmax per score and head."""
    heads = width // HEAD_DIM
    return (4 * width**2 + 2 * length * width + 3 * length * heads) / (4 * width**2 + one_head(length))


def large_model_ratio(length: int, top_k: int = 32) -> float:
    """2 T / (1 + k): every query pays one head width to choose its keys, however many there are."""
    return 2 * length / (1 + top_k)


def embedding_parameters(
    rows: tuple[int, ...],
    widths: tuple[int, ...],
    projected: tuple[int, ...],
    width: int,
    *,
    bias: bool = False,
) -> int:
    """Numbers in tables of `rows` × `widths`, and in projections from each of the `projected` widths to `width`."""
    tables = sum(n * w for n, w in zip(rows, widths, strict=True))
    return tables + sum(w * width + (width if bias else 0) for w in projected)


def figures() -> list[Figure]:
    """Every published number that has a formula, recomputed.

    Example:
        >>> from sparse_attn.analysis import published
        >>> [f.label for f in published.figures() if not f.agrees]
        []
    """
    found = []
    for (width, length), value in zip(README_SIZES, (0.18, 0.67, 2.29, 5.33, 9.85, 15.24), strict=True):
        label = f"{'2048' if width == 1280 else width}d, T={length}"
        found.append(Figure("README, speed-up", label, value, readme_ratio(width, length), 0.00501))
    for (width, length), value in zip(SCRIPT_SIZES, (0.52, 0.90, 1.12, 1.26, 1.43, 1.72, 1.95), strict=True):
        found.append(
            Figure("script, speed-up", f"{width}d, T={length}", value, script_ratio(width, length), 0.0149)
        )
    for length, value in ((8192, 496), (128_000, 7758)):
        found.append(Figure("large model, speed-up", f"T={length}", value, large_model_ratio(length), 0.501))
    for length, top_k, value in (
        (512, 32, 16),
        (1024, 32, 32),
        (2048, 32, 64),
        (8192, 32, 256),
        (128_000, 32, 4000),
    ):
        found.append(Figure("score matrix, memory", f"T={length}", value, length / top_k, 0.0))
    return found + _parameters()


def _parameters() -> list[Figure]:
    """Parameters of the embeddings over those of a plain table, with the rest of the model where it was counted."""
    head = 2 * 128 + 129 * 200  # LayerNorm and output layer of the scaling test
    scaling = embedding_parameters((200, 200, 200), (224, 128, 32), (224, 32), 128) + head
    first = embedding_parameters((100, 100, 100), (96, 64, 32), (96, 32), 64, bias=True)
    by_mass = embedding_parameters((45, 87, 68), (160, 128, 51), (160, 51), 128)
    hashed = embedding_parameters((20, 20, 8), (192, 96, 16), (192,), 128)
    rest = 46_372 - 100 * 64  # the first test's model outside the embedding
    cases = (
        ("scaling test: full tables for each band", 2.626, scaling / (200 * 128 + head)),
        ("first test: full tables for each band", 1.455, (first + rest) / 46_372),
        ("bands by 80 % and 95 % of occurrences", 1.907, by_mass / (200 * 128)),
        ("8 shared rows for rare tokens", 1.190, hashed / (200 * 128)),
    )
    return [Figure("embedding, parameters", label, value, ratio, 0.000501) for label, value, ratio in cases]
