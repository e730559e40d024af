"""Which tokens get wide embedding rows and which narrow ones, and what a table loses by it."""

from sparse_attn.planner.low_rank import BandError, FactorizationReport, factorize, uniform_low_rank
from sparse_attn.planner.plan_widths import plan_widths
from sparse_attn.planner.token_counts import count_tokens
from sparse_attn.planner.width_plan import WidthPlan

__all__ = [
    "BandError",
    "FactorizationReport",
    "WidthPlan",
    "count_tokens",
    "factorize",
    "plan_widths",
    "uniform_low_rank",
]
