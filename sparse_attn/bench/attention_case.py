"""The description of one call of an attention op."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionCase:
    """One call. The setting of the targets is B1 H8 D64, causal, K=64."""

    op: str
    length: int  # keys
    dtype: str = "float32"
    direction: str = "forward"
    inputs: str = "random"
    top_k: int = 64
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    query_length: int | None = None  # None: as many queries as keys
    causal: bool = True
    window: int = 0
    sinks: int = 0
    share: str = "none"
    key_index: bool = False  # ours selects through 8-bit keys
    tail: str = "none"  # what becomes of the keys that are left out

    @property
    def queries(self) -> int:
        return self.length if self.query_length is None else self.query_length

    @property
    def sees_all(self) -> bool:
        """Every query sees every key: there is nothing to mask."""
        return not self.causal or self.queries == 1

    @property
    def scores(self) -> int:
        """How many there are of all heads, were they stored."""
        return self.batch * self.heads * self.queries * self.length

    def __str__(self) -> str:
        """A short name for tables and test ids, with what differs from the usual setting."""
        parts = [
            self.op,
            f"T={self.length}",
            self.dtype,
            {"forward": "fwd", "backward": "bwd", "both": "fwd+bwd"}[self.direction],
            "" if self.inputs == "random" else self.inputs,
            "" if self.top_k == 64 else f"K={self.top_k}",
            "" if self.batch == 1 else f"B={self.batch}",
            self._heads(),
            "" if self.head_dim == 64 else f"D={self.head_dim}",
            "" if self.query_length is None else f"Tq={self.query_length}",
            "" if self.causal else "not causal",
            f"window={self.window}" if self.window else "",
            f"sinks={self.sinks}" if self.sinks else "",
            "" if self.share == "none" else f"share={self.share}",
            "key index" if self.key_index else "",
            "" if self.tail == "none" else f"tail={self.tail}",
        ]
        return " ".join(part for part in parts if part)

    def _heads(self) -> str:
        if self.heads != self.kv_heads:
            return f"heads={self.heads}/{self.kv_heads}"
        return "" if self.heads == 8 else f"heads={self.heads}"
