"""Several processes: DTensor rules, context parallelism, tensor parallelism, and a vocabulary that is split over ranks.

Everything is built on torch.distributed. DTensors may be given to the functions of this package as they are; the rest
is here (docs/distributed.md).
"""

from sparse_attn.distributed.collectives import Traffic, count_bytes
from sparse_attn.distributed.context import (
    context_parallel,
    context_parallel_attention,
    context_parallel_gathered_attention,
)
from sparse_attn.distributed.costs import ContextCost, context_costs
from sparse_attn.distributed.layout import Layout
from sparse_attn.distributed.tensor import AcrossRanks, tensor_parallel
from sparse_attn.distributed.vocabulary import (
    VocabParallel,
    split_plan,
    vocab_parallel_cross_entropy,
    vocab_parallel_embedding,
)

__all__ = [
    "AcrossRanks",
    "ContextCost",
    "Layout",
    "Traffic",
    "VocabParallel",
    "context_costs",
    "context_parallel",
    "context_parallel_attention",
    "context_parallel_gathered_attention",
    "count_bytes",
    "split_plan",
    "tensor_parallel",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_embedding",
]
