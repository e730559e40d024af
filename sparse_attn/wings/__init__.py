"""The wings: one implementation of the ops for each kind of machine, and the dispatcher that chooses among them.

They register themselves on import; the first is the most preferred.
"""

from sparse_attn.wings import cpu, cuda, triton, reference  # noqa: F401  isort: skip
