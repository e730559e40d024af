"""What attention costs by count: operations, bytes and memory of each way, and the published figures recomputed."""

from sparse_attn.analysis.costs import (
    Cost,
    Rates,
    Shape,
    block,
    crossover,
    dense,
    indexer,
    mlp,
    projections,
    topk,
)

__all__ = [
    "Cost",
    "Rates",
    "Shape",
    "block",
    "crossover",
    "dense",
    "indexer",
    "mlp",
    "projections",
    "topk",
]
