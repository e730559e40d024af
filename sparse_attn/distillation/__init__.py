"""Trains cheap stand-ins for attention on what a trained model's own attention does.

The teacher is any model whose attention modules are :class:`sparse_attn.nn.TopKAttention`. Everything streams: one
batch of token ids is run through the teacher, learned from, and forgotten.
"""

from sparse_attn.distillation.baselines import Frequencies
from sparse_attn.distillation.evaluation import evaluate, selection_quality
from sparse_attn.distillation.hybrid import hybridize, train_approximator, train_selector
from sparse_attn.distillation.indexers import distill_indexers
from sparse_attn.distillation.layer_indexers import train_indexers
from sparse_attn.distillation.teacher import Heads, Observation, attention_layers, collect, observe

__all__ = [
    "Frequencies",
    "Heads",
    "Observation",
    "attention_layers",
    "collect",
    "distill_indexers",
    "evaluate",
    "hybridize",
    "observe",
    "selection_quality",
    "train_approximator",
    "train_indexers",
    "train_selector",
]
