"""Whole blocks of rows with several sequences, or padding in front: counted from each one's first token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_attn.integrations.reuse import Chosen, Turn
from sparse_attn.integrations.selectors import BLOCK
from sparse_attn.integrations.visibility import Visibility
from sparse_attn.ops.varlen_blocks import varlen_block_attention, varlen_block_select
from sparse_attn.selection import Selection, Selector


def holds_documents(seen: Visibility, query: Tensor, key: Tensor) -> bool:
    """Whether the queries are the keys, and begin elsewhere than the row. Nobody counts documents in a graph."""
    alike = seen.offset == 0 and query.shape[2] == key.shape[2] and query.shape[2] > 1
    plain = seen.starts is not None and seen.reach is None and seen.mask is None and seen.padding is None
    return alike and plain and not torch.compiler.is_compiling()


def attend_documents(
    query: Tensor,  # [B, Hq, T, D]
    key: Tensor,  # [B, Hkv, T, D]
    value: Tensor,  # [B, Hkv, T, Dv]
    seen: Visibility,
    options: dict[str, Any],
    scores: dict[str, Any],  # parts of the rule
    selector: Selector,
    turn: Turn | None,
) -> Tensor:  # [B, Hq, T, Dv]
    """`selector="blocks"` as a packed call; padding in front is a document of its own, of no interest."""
    batch, _, length, _ = query.shape
    cu_seq = _bounds(seen, batch, length, query.device)
    longest = int(cu_seq.diff().max())
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    where = cu_seq, None, longest, longest
    common = {"is_causal": True, "backend": options["backend"], **scores}
    if isinstance(selector, Chosen):
        blocks = selector.selection.indices
    else:
        with torch.no_grad():
            blocks = varlen_block_select(
                q, k, *where, options["top_k"] // BLOCK, block_size=BLOCK, query_tile=BLOCK,
                share=options["share"], **common,
            )  # fmt: skip
    if turn is not None:
        turn.leave(Selection(blocks, BLOCK, BLOCK))
    out = varlen_block_attention(q, k, v, blocks, *where, block_size=BLOCK, query_tile=BLOCK, **common)
    assert isinstance(out, Tensor)
    return out.unflatten(0, (batch, length)).transpose(1, 2)


def _bounds(seen: Visibility, batch: int, length: int, device: torch.device) -> Tensor:
    """int64 [S + 1]: where the documents of all rows begin, the rows end to end."""
    assert seen.starts is not None
    starts = seen.starts if seen.starts.dim() == 2 else seen.starts.unsqueeze(1)
    position = torch.arange(length, device=device)
    begins = (position == starts.expand(batch, length)) | (position == 0)
    found = begins.flatten().nonzero().squeeze(1)
    return torch.cat((found, found.new_tensor([batch * length])))
