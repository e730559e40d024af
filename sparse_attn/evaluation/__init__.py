"""What a causal language model loses by attending sparsely: text, needles, and which keys are found.

from sparse_attn.evaluation import Document, Plan, Store, evaluate_model, tables

store = Store(Path("evaluation.json"), {"model": name})
evaluate_model(model, [Document("a text", ids)], Plan(selectors=["exact+tail"], tasks=["text"]), store)
for table in tables(store):
    print(table)
"""

from sparse_attn.evaluation.arms import Arm
from sparse_attn.evaluation.harness import Plan, evaluate_model
from sparse_attn.evaluation.intervals import Interval, interval
from sparse_attn.evaluation.likelihood import Document
from sparse_attn.evaluation.report import Compared, Table, compared, draw, tables
from sparse_attn.evaluation.store import Store

__all__ = [
    "Arm",
    "Compared",
    "Document",
    "Interval",
    "Plan",
    "Store",
    "Table",
    "compared",
    "draw",
    "evaluate_model",
    "interval",
    "tables",
]
