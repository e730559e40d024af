"""Which tokens get wide embedding rows and which narrow ones, and what a table loses by it."""

from sparse_attn.planner.width_plan import WidthPlan

__all__ = ["WidthPlan"]
