"""`PagedKeyIndex`: the 8-bit rows of a KeyIndex for keys in pages, in pages of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.checks import packed as check
from sparse_attn.ops.declare import Op
from sparse_attn.wings.base import first_of
from sparse_attn.wings.reference.index_keys import BLOCK

WRITE = Op(
    "index_pages",
    "(Tensor key, Tensor slots, Tensor(a!) codes, Tensor(b!) bounds, Tensor shift) -> ()",
    lambda *arguments: None,
)


class PagedKeyIndex:
    r"""A :class:`sparse_attn.KeyIndex` of keys in the pages of a cache: the same selection for fewer bytes.

    Its pages are those of the keys and are found through the same `block_table`; it is no index of any one sequence:
    sequences come, go and share pages, and nothing is to be told of it. Whatever is written to the cache has to be
    written to it, too. Keys that never were are scored as they are; those that were overwritten in the cache alone
    are what it cannot see.

    It serves sequences of up to 16 queries with a selection per head (decoding, drafts), on the CPU wing; other calls
    take it and do without it. Indices, outputs and LSE are those without an index, to the bit. It pays in float32, and
    in half types where few query heads share a key head or top_k is small beside the keys (docs/performance.md).

    Attributes:
        codes: int8 [P, Hkv, page size/16, ⌈D/4⌉, 16, 4], bounds: float32 [P, Hkv, page size/16, 3, 16].
        shift: float32 [Hkv, D], the mean of the keys that were written first; None until then.
        dtype: that of the keys.

    Example:
        >>> import torch, sparse_attn
        >>> keys, values = torch.zeros(10, 16, 2, 64), torch.zeros(10, 16, 2, 64)  # ten pages of 16 tokens
        >>> index = sparse_attn.PagedKeyIndex.of(keys)
        >>> new, slots = torch.randn(40, 2, 64), torch.arange(40) + 32  # a prompt, into the pages 2, 3, 4
        >>> keys.flatten(0, 1)[slots] = new
        >>> index = index.write(slots, new)
        >>> table, used = torch.tensor([[2, 3, 4]], dtype=torch.int32), torch.tensor([40])
        >>> sparse_attn.varlen_topk_attention(
        ...     torch.randn(1, 4, 64), keys, values, torch.tensor([0, 1]), None, 1, 48, 8, is_causal=True,
        ...     seqused_k=used, block_table=table, key_index=index,
        ... ).shape
        torch.Size([1, 4, 64])
    """

    def __init__(self, codes: Tensor, bounds: Tensor, dim: int, dtype: torch.dtype) -> None:
        self.codes, self.bounds, self.dim, self.dtype = codes, bounds, dim, dtype
        self.shift: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, key: Tensor, slots: Tensor | None = None) -> PagedKeyIndex:
        """The index of a cache [P, page size, Hkv, D] with pages of a multiple of 16 keys.

        Args:
            key: float32, float16, bfloat16 or float64.
            slots: int32 or int64 [T]: which keys there are in it, as page · page size + place; None: none yet.

        Raises:
            TypeError, ValueError, IndexError: it is no such cache, or they are no such slots.
        """
        check.pages("key", key, "[P, page size, Hkv, D]")
        checks.keys("key", key.transpose(1, 2))
        count, size, heads, dim = key.shape
        if size % BLOCK:
            raise ValueError(f"an index needs pages of a multiple of {BLOCK} keys, got pages of {size}")
        blocks = count, heads, size // BLOCK
        bounds = key.new_zeros(*blocks, 3, BLOCK, dtype=torch.float32)
        bounds[..., 2, :] = torch.inf  # nothing is known of these keys: no bound rules one out
        index = cls(key.new_zeros(*blocks, -(-dim // 4), BLOCK, 4, dtype=torch.int8), bounds, dim, key.dtype)
        if slots is not None:
            slots = index._slots(slots)
            index.write(slots, key.flatten(0, 1)[slots])
        return index

    @torch.no_grad()
    def write(self, slots: Tensor, key: Tensor) -> PagedKeyIndex:
        """Takes the keys [T, Hkv, D] that now stand in the cache at `slots`, and returns itself.

        Args:
            slots: int32 or int64 [T], page · page size + place in the page.
            key: [T, Hkv, D], of the cache's dtype.

        Raises:
            TypeError, ValueError: keys that do not go with the cache, in size, dtype or device, or no slots for them.
            IndexError: a slot that is in no page (read on the CPU).
        """
        check.packed_tensor("key", key, "[T, Hkv, D]")
        slots = self._slots(slots)
        heads = self.codes.shape[1]
        if key.dtype != self.dtype:
            raise TypeError(f"key_index is one of {self.dtype} keys, got key {key.dtype}")
        if key.shape != (len(slots), heads, self.dim) or key.device != self.codes.device:
            raise ValueError(
                f"key must be [T, Hkv, D] = {[len(slots), heads, self.dim]} on {self.codes.device}, one for each slot, "
                f"got {checks.describe(key)} on {key.device}"
            )
        if len(slots) == 0:
            return self
        if self.shift is None:
            # Any shift is right; the mean of the keys makes what is rounded small.
            mean = key[:4096].float().mean(0)
            self.shift = torch.where(mean.abs() < 1e15, mean, 0.0).contiguous()
        WRITE.on(first_of("index_pages", key))(key, slots, self.codes, self.bounds, self.shift)
        return self

    def _slots(self, slots: object) -> Tensor:
        total = self.codes.shape[0] * self.codes.shape[2] * BLOCK
        return check.slots("slots", slots, total, self.codes.device)

    def __repr__(self) -> str:
        pages, heads, blocks = self.codes.shape[:3]
        return f"PagedKeyIndex of {pages} pages of {blocks * BLOCK} keys (Hkv={heads}, D={self.dim}, {self.dtype})"

    def check(self, key: Tensor) -> None:
        """Raises a ValueError or TypeError where it cannot be the index of the pages `key` [P, page size, Hkv, D]."""
        pages, heads, blocks = self.codes.shape[:3]
        if key.dtype != self.dtype:
            raise TypeError(f"key_index is one of {self.dtype} keys, got key {key.dtype}")
        if key.device != self.codes.device:
            raise ValueError(f"key_index is on {self.codes.device}, got key on {key.device}")
        if tuple(key.shape) != (pages, blocks * BLOCK, heads, self.dim):
            raise ValueError(
                f"key_index is of pages [P, page size, Hkv, D] = {[pages, blocks * BLOCK, heads, self.dim]}, "
                f"got key {list(key.shape)}"
            )


def parts_of(index: object, key: Tensor) -> tuple[Tensor | None, ...]:
    """What the ops take of an index of the pages `key` [P, page size, Hkv, D]; refuses what is none."""
    if index is None:
        return None, None, None
    if not isinstance(index, PagedKeyIndex):
        raise TypeError(
            f"key_index must be a sparse_attn.PagedKeyIndex of the pages, got {checks.describe(index)}"
        )
    index.check(key)
    if index.shift is None:  # nothing was written
        return None, None, None
    return index.codes, index.bounds, index.shift
