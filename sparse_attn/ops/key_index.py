"""`KeyIndex`: 8-bit rows of the keys of a cache, which make exact selection cheap; and the op that selects by them."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn import rule as rules
from sparse_attn.checks.values import mapped
from sparse_attn.ops.declare import Op
from sparse_attn.rule import PackedRule, selection_shape
from sparse_attn.wings.base import first_of
from sparse_attn.wings.reference.index_keys import BLOCK

MOST_QUERIES = 16  # more of them are scored without an index


def fake(query, key, top_k, rule: PackedRule, *index) -> Tensor:
    return query.new_empty(selection_shape(query, key, top_k, rule), dtype=torch.int32)


PARTS = "Tensor codes, Tensor bounds, Tensor shift"  # of an index
OP = Op(
    "indexed_select", f"(Tensor query, Tensor key, SymInt top_k, {rules.SCHEMA}, {PARTS}) -> Tensor", fake
)

WRITE = Op(
    "index_keys",
    "(Tensor key, Tensor(a!) codes, Tensor(b!) bounds, Tensor shift, SymInt begin) -> ()",
    lambda *arguments: None,
)


class KeyIndex:
    r"""Keys rounded to 8 bits with bounds of their errors, kept beside a cache: the same selection for fewer bytes.

    For a query q and a key k, less a fixed shift :math:`\mu` of its head, with their rounded twins,

    .. math:: |q \cdot (k - \mu) - \hat q \cdot \hat k| \le
              \lVert q - \hat q \rVert \lVert k - \mu \rVert + \lVert \hat q \rVert \lVert k - \mu - \hat k \rVert

    so most keys are ruled out by reading D + 12 bytes of each; the others are scored from the keys themselves.
    Indices, outputs and LSE are those without an index, to the bit. It serves up to 16 queries with a selection per
    head (decoding), on the CPU wing, the Triton wing and the reference; other calls take it and do without it.

    The index knows the keys that it was made of and given since: it is for the caller to append, reorder and crop it
    as the cache is. What can be seen (sizes, dtype, device) is checked at each call.

    Attributes:
        codes: int8 [B, Hkv, N, ⌈D/4⌉, 16, 4], bounds: float32 [B, Hkv, N, 3, 16], shift: float32 [B, Hkv, D].
        length: how many keys it knows; N·16 of them have room.
        dtype: that of the keys.

    Example:
        >>> import torch, sparse_attn
        >>> q, k, v = torch.randn(1, 8, 1, 64), torch.randn(1, 2, 4000, 64), torch.randn(1, 2, 4000, 64)
        >>> index = sparse_attn.KeyIndex.of(k)
        >>> with_index = sparse_attn.topk_attention(q, k, v, 64, key_index=index)
        >>> bool((with_index == sparse_attn.topk_attention(q, k, v, 64)).all())
        True
    """

    def __init__(self, codes: Tensor, bounds: Tensor, shift: Tensor, length: int, dtype: torch.dtype) -> None:
        self.codes, self.bounds, self.shift = codes, bounds, shift
        self.length, self.dtype = length, dtype
        self._check_parts()

    @classmethod
    @torch.no_grad()
    def of(cls, key: Tensor, *, capacity: int = 0) -> KeyIndex:
        """The index of the keys [B, Hkv, Tk, D], with room for `capacity` keys before it has to grow.

        Raises:
            TypeError, ValueError: `key` is no tensor of that shape in float32, float16, bfloat16 or float64.
        """
        checks.keys("key", key)
        capacity = checks.integer("capacity", capacity, 0)
        # Any shift is right; the mean of the keys makes what is rounded small.
        few = key[:, :, :4096].float()
        return index_around(few.mean(2) if key.shape[2] else few.sum(2), key, capacity)

    def append(self, key: Tensor) -> KeyIndex:
        """Adds keys [B, Hkv, t, D] behind those that it knows, and returns itself. Room is doubled where it is full.

        Raises:
            TypeError, ValueError: keys that do not go with the others, in size, dtype or device.
        """
        checks.keys("key", key)
        self._check(key)
        append_known(self, key, first_of("index_keys", key))
        return self

    @torch.no_grad()
    def reorder(self, beam_idx: Tensor) -> KeyIndex:
        """Takes the sequences `beam_idx` [B'] of its batch, as a cache does in beam search, and returns itself.

        Raises:
            TypeError, ValueError, IndexError: `beam_idx` is no list of sequences that it has.
        """
        beam_idx = checks.sequences("beam_idx", beam_idx, self.codes.shape[0], self.codes.device)
        self.codes, self.bounds, self.shift = (
            t.index_select(0, beam_idx) for t in (self.codes, self.bounds, self.shift)
        )
        return self

    def crop(self, length: int) -> KeyIndex:
        """Forgets all keys but the first `length` (a negative number: the last so many), and returns itself.

        Raises:
            TypeError, ValueError: it does not know so many.
        """
        length = checks.integer("length", length, -self.length, self.length)
        self.length = length if length >= 0 else self.length + length
        return self

    def __repr__(self) -> str:
        batch, heads = self.codes.shape[:2]
        return (
            f"KeyIndex of {self.length} keys (B={batch}, Hkv={heads}, D={self.shift.shape[2]}, {self.dtype})"
        )

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the op takes of it."""
        return self.codes, self.bounds, self.shift

    def check(self, key: Tensor) -> None:
        """Raises a ValueError or TypeError where it cannot be the index of `key`."""
        self._check(key)
        if key.shape[2] != self.length:
            raise ValueError(
                f"key_index must know the keys that are given: it knows {self.length}, key has {key.shape[2]}"
            )

    def _check_parts(self) -> None:
        named = {"codes": self.codes, "bounds": self.bounds, "shift": self.shift}
        for name, part in named.items():
            wanted = torch.int8 if name == "codes" else torch.float32
            if not isinstance(part, Tensor) or part.dtype != wanted:
                kind = str(wanted).removeprefix("torch.")
                raise TypeError(f"{name} must be a tensor of {kind}, got {checks.describe(part)}")
        if self.codes.dim() != 6 or self.shift.dim() != 3:
            raise ValueError(
                "codes must have shape [B, Hkv, N, ⌈D/4⌉, 16, 4] and shift [B, Hkv, D], "
                f"got {list(self.codes.shape)} and {list(self.shift.shape)}"
            )
        batch, heads, dim = self.shift.shape
        blocks = self.codes.shape[2]
        shapes = {
            "codes": [batch, heads, blocks, -(-dim // 4), BLOCK, 4],
            "bounds": [batch, heads, blocks, 3, BLOCK],
        }
        for name, shape in shapes.items():
            if list(named[name].shape) != shape:
                raise ValueError(
                    f"{name} must have shape {shape} beside shift {list(self.shift.shape)}, "
                    f"got {list(named[name].shape)}"
                )
        self.length = checks.integer("length", self.length, 0, blocks * BLOCK)

    def _check(self, key: Tensor) -> None:
        batch, heads, dim = self.shift.shape
        if not 0 <= self.length <= self.codes.shape[2] * BLOCK:
            raise ValueError(
                f"key_index must know 0 … {self.codes.shape[2] * BLOCK} keys, for which it has room, "
                f"got length={self.length}"
            )
        if key.dtype != self.dtype:
            raise TypeError(f"key_index is one of {self.dtype} keys, got key {key.dtype}")
        if key.device != self.codes.device:
            raise ValueError(f"key_index is on {self.codes.device}, got key on {key.device}")
        if (key.shape[0], key.shape[1], key.shape[3]) != (batch, heads, dim):
            raise ValueError(
                f"key_index has B={batch}, Hkv={heads}, D={dim}, got key [B, Hkv, Tk, D] = {list(key.shape)}"
            )


def append_known(index: KeyIndex, key: Tensor, wing: str) -> None:
    """`KeyIndex.append` on that wing, of keys that are known to go with the others: nothing is checked."""
    begin, end = index.length, index.length + key.shape[2]
    _reserve(index, end)
    WRITE.on(wing)(key.detach() if key.requires_grad else key, *index.tensors(), begin)
    index.length = end


def _reserve(index: KeyIndex, length: int) -> None:
    room = index.codes.shape[2]
    if length <= room * BLOCK:
        return
    blocks = max(-(-length // BLOCK), 2 * room)
    for name in ("codes", "bounds"):
        old = getattr(index, name)
        new = old.new_zeros(*old.shape[:2], blocks, *old.shape[3:])
        new[:, :, :room] = old
        setattr(index, name, new)


def index_around(shift: Tensor, key: Tensor, capacity: int = 0) -> KeyIndex:
    """`KeyIndex.of` with a shift float32 [B, Hkv, D] that is given."""
    batch, heads, length, dim = key.shape
    blocks = -(-max(length, capacity) // BLOCK)
    index = KeyIndex(
        key.new_zeros(batch, heads, blocks, -(-dim // 4), BLOCK, 4, dtype=torch.int8),
        key.new_zeros(batch, heads, blocks, 3, BLOCK, dtype=torch.float32),
        torch.where(shift.abs() < 1e15, shift, 0.0).contiguous(),
        0,
        key.dtype,
    )
    return index.append(key)


def serves(index: object, query: Tensor, key: Tensor, rule: PackedRule) -> bool:
    """Whether there is an index, and the call is one that it makes cheaper; refuses what is no index of these keys.

    Heads that share a selection need every score, and many queries read a key once for all of them.
    """
    if index is None:
        return False
    if not isinstance(index, KeyIndex):
        raise TypeError(f"key_index must be a sparse_attn.KeyIndex, got {checks.describe(index)}")
    index.check(key)
    if mapped(key) and not mapped(index.codes):
        raise ValueError("key_index is of the same keys in all entries of a vmap over key: leave it out")
    return query.shape[2] <= MOST_QUERIES and rule.groups == query.shape[1]
