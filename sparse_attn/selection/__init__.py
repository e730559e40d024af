"""Two stages and one place where they meet: a selector chooses keys, :func:`attend` attends to them.

    selection = Exact().select(query, key, 64, Rule(is_causal=True))
    out = attend(query, key, value, selection)

A selector is anything with `select(query, key, top_k, rule) -> Selection`; those of this package are here, and a
user's own class goes wherever they go.
"""

from sparse_attn.rule import Rule
from sparse_attn.selection.attend import attend, select_and_attend
from sparse_attn.selection.hierarchical import Hierarchical
from sparse_attn.selection.selection import Selection, Selector
from sparse_attn.selection.selectors import Blocks, Exact, FromIndexer, LowRank, Refined, Rounded

__all__ = [
    "Blocks",
    "Exact",
    "FromIndexer",
    "Hierarchical",
    "LowRank",
    "Refined",
    "Rounded",
    "Rule",
    "Selection",
    "Selector",
    "attend",
    "select_and_attend",
]
