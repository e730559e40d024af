"""Counts of one forward pass of attention: dense, exact top-k, indexer, blocks, and selection by a small network.

Multiply and add are two operations. Exponentials, comparisons and divisions are not counted: they do not go through
the units whose rate a peak is. What a mask hides is not counted, whether or not a kernel skips it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sparse_attn import checks


@dataclass(frozen=True)
class Shape:
    """An attention layer, or `layers` equal ones, over sequences of `length` tokens.

    Args:
        length: T, queries and keys.
        num_heads: Hq, query heads.
        head_dim: D, width of a head's queries, keys and values.
        num_kv_heads: Hkv, key/value heads; None means Hq.
        batch: B, sequences.
        layers: equal layers.
        is_causal: query i sees keys 0 … i, else all T.
        itemsize: bytes of a number.

    Raises:
        TypeError, ValueError: a size that is no positive integer, or Hq that is no multiple of Hkv.

    Example:
        >>> from sparse_attn.analysis import Shape
        >>> Shape(4, num_heads=2, head_dim=8).pairs
        10
    """

    length: int
    num_heads: int = 8
    head_dim: int = 64
    num_kv_heads: int | None = None
    batch: int = 1
    layers: int = 1
    is_causal: bool = True
    itemsize: int = 4

    def __post_init__(self) -> None:
        for name in ("length", "num_heads", "head_dim", "kv_heads", "batch", "layers", "itemsize"):
            checks.integer("num_kv_heads" if name == "kv_heads" else name, getattr(self, name), 1)
        checks.boolean("is_causal", self.is_causal)
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, but they are {self.num_heads} and {self.kv_heads}"
            )

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def embed_dim(self) -> int:
        """Hq·D, the width of the stream."""
        return self.num_heads * self.head_dim

    @property
    def sequences(self) -> int:
        """Sequences times layers."""
        return self.batch * self.layers

    @property
    def pairs(self) -> int:
        """Visible pairs of a query and a key, per head and sequence."""
        return self.length * (self.length + 1) // 2 if self.is_causal else self.length**2

    def kept(self, top_k: int) -> int:
        """Pairs left when each query keeps at most `top_k` of the keys that it sees, per head and sequence."""
        top_k = min(top_k, self.length)
        short = top_k * (top_k - 1) // 2 if self.is_causal else 0  # what the first queries lack
        return self.length * top_k - short

    @property
    def stream_bytes(self) -> int:
        """Query, key, value and output, each moved once."""
        rows = 2 * self.num_heads + 2 * self.kv_heads
        return self.sequences * self.length * rows * self.head_dim * self.itemsize


@dataclass(frozen=True)
class Cost:
    """What one forward pass costs; the projections of query, key, value and output are apart (`projections`).

    Args:
        select_flops: operations of choosing the keys.
        attend_flops: operations of attending to the chosen ones.
        project_flops: operations that make the tensors of the selection from the stream.
        stream_bytes: bytes that are moved in order, at the least.
        gather_bytes: bytes of rows read one by one.
        memory: bytes held at once beyond the inputs and the output, by a kernel that stores nothing it need not.
        parameters: learned numbers that dense attention does not have.
    """

    select_flops: int = 0
    attend_flops: int = 0
    project_flops: int = 0
    stream_bytes: int = 0
    gather_bytes: int = 0
    memory: int = 0
    parameters: int = 0

    @property
    def flops(self) -> int:
        """All operations."""
        return self.select_flops + self.attend_flops + self.project_flops


@dataclass(frozen=True)
class Rates:
    """What a machine does per second: operations in a matrix product, bytes in order, bytes of gathered rows."""

    flops: float
    stream: float
    gather: float

    def seconds(self, cost: Cost) -> float:
        """The time of `cost` if every stage ran at its peak: arithmetic or bytes in order, whichever is longer; then
        the gathered rows or the arithmetic on them, whichever is longer.

        Example:
            >>> from sparse_attn.analysis import Rates, Shape, dense
            >>> round(Rates(flops=1e11, stream=1e10, gather=1e10).seconds(dense(Shape(4096))), 4)
            0.1718
        """
        first = cost.select_flops + cost.project_flops + (0 if cost.gather_bytes else cost.attend_flops)
        gathered = max(cost.attend_flops / self.flops, cost.gather_bytes / self.gather)
        return max(first / self.flops, cost.stream_bytes / self.stream) + (
            gathered if cost.gather_bytes else 0
        )


def dense(shape: Shape, *, stores_scores: bool = False) -> Cost:
    r"""Dense attention: :math:`4 D H_q` operations per visible pair.

    Args:
        shape: the layer.
        stores_scores: count the memory of a kernel that stores all scores, causal or not, instead of a tiled one.

    Example:
        >>> from sparse_attn.analysis import Shape, dense
        >>> dense(Shape(1024, is_causal=False)).flops == 4 * 1024**2 * 512
        True
    """
    return Cost(
        attend_flops=4 * shape.head_dim * shape.num_heads * shape.pairs * shape.sequences,
        stream_bytes=shape.stream_bytes,
        memory=shape.batch * shape.num_heads * shape.length**2 * shape.itemsize if stores_scores else 0,
    )


def topk(shape: Shape, top_k: int, *, indices_given: bool = False) -> Cost:
    r"""Exact top-k attention: :math:`2 D H_q` per visible pair to choose, :math:`4 D H_q` per kept pair to attend.

    Args:
        shape: the layer.
        top_k: keys per query.
        indices_given: leave the choice out: `gathered_attention` alone.

    Example:
        >>> from sparse_attn.analysis import Shape, dense, topk
        >>> long = Shape(1_000_000)
        >>> round(dense(long).flops / topk(long, 64).flops, 2)  # never above 2: every pair is scored
        2.0
    """
    top_k = checks.integer("top_k", top_k, 1)
    work = _gathered(shape, top_k)
    select = 0 if indices_given else 2 * shape.head_dim * shape.num_heads * shape.pairs * shape.sequences
    return Cost(select_flops=select, stream_bytes=shape.stream_bytes, **work)


def indexer(shape: Shape, top_k: int, *, heads: int = 4, dim: int = 32, groups: int = 1) -> Cost:
    r"""A learned indexer chooses, exact attention follows: :math:`(2 D_i + 2) H_i G` per visible pair to choose.

    Args:
        shape: the layer.
        top_k: keys per query.
        heads: H_i, the indexer's heads per group.
        dim: D_i, their width.
        groups: G, groups of attention heads that choose for themselves.

    Source of the scores: DeepSeek-AI, "DeepSeek-V3.2-Exp" (2025); see :func:`sparse_attn.indexer_select`.

    Example:
        >>> from sparse_attn.analysis import Shape, dense, indexer
        >>> long = Shape(1_000_000)
        >>> round(dense(long).flops / indexer(long, 64).flops, 1)
        7.7
    """
    heads, dim = checks.integer("heads", heads, 1), checks.integer("dim", dim, 1)
    groups = checks.integer("groups", groups, 1)
    work = _gathered(shape, checks.integer("top_k", top_k, 1), groups)
    made = groups * (heads * dim + dim + heads)  # numbers per token: queries, one key, the heads' weights
    return Cost(
        select_flops=(2 * dim + 2) * heads * groups * shape.pairs * shape.sequences,
        project_flops=2 * shape.embed_dim * made * shape.length * shape.sequences,
        stream_bytes=shape.stream_bytes + made * shape.length * shape.itemsize * shape.sequences,
        parameters=shape.embed_dim * made * shape.layers,
        **work,
    )


def block(shape: Shape, top_blocks: int, *, block_size: int = 64, query_tile: int = 64) -> Cost:
    r"""Tiles of queries choose whole blocks of keys by their means: :math:`2 D H_q` per pair of a tile and a block.

    Args:
        shape: the layer.
        top_blocks: blocks per tile.
        block_size: keys in a block.
        query_tile: queries that choose together.

    Example:
        >>> from sparse_attn.analysis import Shape, block, dense
        >>> long = Shape(1_000_000)
        >>> round(dense(long).flops / block(long, 4).flops)
        1575
    """
    top_blocks = checks.integer("top_blocks", top_blocks, 1)
    block_size = checks.integer("block_size", block_size, 1)
    query_tile = checks.integer("query_tile", query_tile, 1)
    tiles, blocks = -(-shape.length // query_tile), -(-shape.length // block_size)
    scored = tiles * blocks // (2 if shape.is_causal else 1)
    keys = min(top_blocks * block_size, shape.length)
    loaded = tiles * keys * 2 * shape.head_dim * shape.num_heads * shape.itemsize
    return Cost(
        select_flops=2 * shape.head_dim * shape.num_heads * (scored + shape.length) * shape.sequences,
        attend_flops=4 * shape.head_dim * shape.num_heads * shape.kept(keys) * shape.sequences,
        stream_bytes=shape.stream_bytes + loaded * shape.sequences,
        memory=4 * tiles * top_blocks * shape.num_heads * shape.batch,
    )


def mlp(shape: Shape, top_k: int, *, selector_hidden: int = 64, approximator_hidden: int = 64) -> Cost:
    r"""Two small networks per head: one gives each query a logit per key position, one turns k values into the output.

    Choosing takes :math:`2 h D` per query and :math:`2 h` per visible pair, so it stays quadratic in T; the second
    network :math:`2 h' D (k + 1)` per query. See :class:`sparse_attn.nn.KeySelector`.

    Args:
        shape: the layer; all its heads are replaced.
        top_k: keys per query.
        selector_hidden: h, the hidden width of the network that chooses.
        approximator_hidden: h', the hidden width of the network that gives the output.

    Example:
        >>> from sparse_attn.analysis import Shape, dense, mlp
        >>> long = Shape(1_000_000)
        >>> round(dense(long).flops / mlp(long, 8, selector_hidden=128, approximator_hidden=128).flops, 2)
        1.0
    """
    top_k = min(checks.integer("top_k", top_k, 1), shape.length)
    hidden = checks.integer("selector_hidden", selector_hidden, 1)
    inner = checks.integer("approximator_hidden", approximator_hidden, 1)
    width, length, networks = shape.head_dim, shape.length, shape.num_heads * shape.sequences
    selector = width * hidden + hidden + hidden * length + length
    approximator = top_k * width * inner + inner + inner * width + width
    return Cost(
        select_flops=2 * hidden * (width * length + shape.pairs) * networks,
        attend_flops=2 * inner * width * (top_k + 1) * length * networks,
        stream_bytes=shape.stream_bytes + selector * shape.itemsize * shape.num_heads * shape.layers,
        gather_bytes=shape.kept(top_k) * width * shape.itemsize * networks,
        memory=4 * length * top_k * shape.num_heads * shape.batch,
        parameters=(selector + approximator) * shape.num_heads * shape.layers,
    )


def projections(shape: Shape) -> Cost:
    r"""Query, key, value and output projections: :math:`4 C D (H_q + H_{kv})` operations per token, the same for all.

    Example:
        >>> from sparse_attn.analysis import Shape, projections
        >>> projections(Shape(1024)).flops == 8 * 1024 * 512**2
        True
    """
    weights = 2 * shape.embed_dim * shape.head_dim * (shape.num_heads + shape.kv_heads)
    moved = weights * shape.layers + 5 * shape.embed_dim * shape.length * shape.sequences
    return Cost(
        project_flops=2 * weights * shape.length * shape.sequences, stream_bytes=moved * shape.itemsize
    )


def crossover(
    cheaper: Callable[[int], float],
    dearer: Callable[[int], float],
    *,
    factor: float = 1.0,
    longest: int = 2**30,
) -> int | None:
    """The smallest length T from which ``dearer(T) / cheaper(T)`` exceeds `factor`; None if it does not by `longest`.

    The ratio must rise with T, as that of a quadratic to a cheaper cost does.

    Example:
        >>> from sparse_attn.analysis import Shape, crossover, dense, topk
        >>> crossover(lambda t: topk(Shape(t), 64).flops, lambda t: dense(Shape(t)).flops)
        219
        >>> crossover(lambda t: topk(Shape(t), 64).flops, lambda t: dense(Shape(t)).flops, factor=500) is None
        True
    """
    low, high = 0, 1  # the ratio is above the factor at high
    while dearer(high) <= factor * cheaper(high):
        low, high = high, 2 * high
        if high > longest:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        if dearer(middle) > factor * cheaper(middle):
            high = middle
        else:
            low = middle
    return high


def _gathered(shape: Shape, top_k: int, groups: int | None = None) -> dict[str, int]:
    """Exact attention to top_k keys per query, and the indices (of `groups` heads, None: all) that say which."""
    pairs = shape.kept(top_k) * shape.num_heads * shape.sequences
    rows = (shape.num_heads if groups is None else groups) * shape.batch * shape.length
    return {
        "attend_flops": 4 * shape.head_dim * pairs,
        "gather_bytes": 2 * shape.head_dim * shape.itemsize * pairs,
        "memory": 4 * rows * min(top_k, shape.length),
    }
