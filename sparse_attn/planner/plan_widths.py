"""`plan_widths`: bands and widths from token counts, under a budget of parameters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sparse_attn.planner.choose_widths import ALPHA, BETA, choose_widths
from sparse_attn.planner.width_plan import WidthPlan


def plan_widths(
    counts: Tensor | Sequence[float],
    embedding_dim: int,
    *,
    budget: int | None = None,
    ratio: float | None = None,
    num_bands: int = 4,
    rule: str = "lagrange",
    multiple_of: int = 8,
    beta: float = BETA,
    alpha: float = ALPHA,
) -> WidthPlan:
    """How wide each token's embedding row should be, from how often it occurs.

    The plan has at most `budget` numbers in its tables and projections together, and uses at least 97 % of the budget
    wherever a plan can whose bands are worth their projections. Of two tokens the more frequent never has the narrower
    row; tokens that never occur are in the narrowest band, unless the budget cannot be used otherwise. A budget of the
    full table or more gives the full table.

    Args:
        counts: how often each token occurs, [V], in id order (the ids need no order of frequency); integers or
            floats, finite, not negative. Counts that are all zero are taken as all equal.
        embedding_dim: the model's width D.
        budget: the most parameters, tables and projections together. Either this or `ratio`.
        ratio: the same as a share of the full table's V · D, in (0, 1].
        num_bands: the most bands; fewer where fewer are better or cannot be told apart.
        rule: where the bands end and how wide they are.

            "lagrange" (default): least expected error Σ_t p_t err(w_t), where p_t is a token's share of the
            occurrences and err(w) = Σ_{i>w} i^-β / Σ_i i^-β the energy that the best w directions miss. It is the
            default because it is the one that weighs a projection's cost against its use; on the embedding of a trained
            language model it lost least (docs/planner.md).

            "power": widths ∝ p^alpha (Ginart et al., Mixed Dimension Embeddings, 2019).

            "mass": the tokens that make up the first 80 %, the next 15 %, 4 %, … of all occurrences; widths fall by a
            factor of 4 from band to band (Baevski and Auli, Adaptive Input Representations, 2019).

            Where the bands of "power" or "mass" cannot use 97 % of the budget, those of "lagrange" are taken.
        multiple_of: every width is a multiple of this, or D itself.
        beta: the decay of the spectrum, rule "lagrange", in (0, 4]. The larger it is, the less wide rows matter.
        alpha: the exponent of rule "power", in [0, 1].

    Returns:
        A `WidthPlan`, bands from the widest to the narrowest.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range; the budget is below the smallest
            possible plan, which the message names; neither or both of `budget` and `ratio` are given.

    Example::

        >>> import torch
        >>> counts = 1e6 / torch.arange(1, 10001)  # Zipf's law
        >>> plan = plan_widths(counts, 256, budget=640_000)
        >>> plan.num_parameters() <= 640_000
        True
    """
    widths, token_band = choose_widths(
        counts,
        embedding_dim,
        budget=budget,
        ratio=ratio,
        num_bands=num_bands,
        rule=rule,
        multiple_of=multiple_of,
        beta=beta,
        alpha=alpha,
    )
    return WidthPlan(embedding_dim, widths, token_band)
