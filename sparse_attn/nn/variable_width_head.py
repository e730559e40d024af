"""An output head over a vocabulary in bands: logits, exact loss, log-probabilities and predictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.nn.variable_width_embedding import VariableWidthEmbedding, refuse_tied_weight
from sparse_attn.nn.whole_state import WholeState
from sparse_attn.ops.variable_width_cross_entropy import variable_width_cross_entropy
from sparse_attn.planner import WidthPlan

# Logits of one step of a prediction: 16 MiB in float32.
_LOGITS = 1 << 22


class VariableWidthHead(WholeState):
    """In place of the last `nn.Linear(embedding_dim, V, bias=False)`: the logit of a token is hidden · its embedding.

    `VariableWidthHead(embedding)` shares the embedding's parameters (weight tying); `VariableWidthHead.from_plan(plan)`
    has its own. A class costs the width of its band, not the model's. Train with `loss`, which stores no logits.
    Every method calls the module, so that its hooks run: FSDP2 gathers what `fully_shard` has sharded.

    Args:
        embedding: the VariableWidthEmbedding to share. It becomes a submodule, so that its parameters stand under both
            names in the model's state dict, once in `parameters()`. The logit of its padding token is that of its row.
        backend: force one wing ("cpu", "cuda", "triton", "reference") for the loss; None chooses.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.

    Example:
        >>> import torch, sparse_attn
        >>> from sparse_attn.planner import WidthPlan
        >>> plan = WidthPlan.from_cutoffs(1000, 64, cutoffs=[100], widths=[64, 8])
        >>> embedding = sparse_attn.nn.VariableWidthEmbedding(plan)
        >>> head = sparse_attn.nn.VariableWidthHead(embedding)
        >>> ids = torch.randint(1000, (2, 16))
        >>> head.loss(embedding(ids), ids).shape, head(embedding(ids)).shape
        (torch.Size([]), torch.Size([2, 16, 1000]))
    """

    def __init__(self, embedding: VariableWidthEmbedding, backend: str | None = None) -> None:
        super().__init__()
        if not isinstance(embedding, VariableWidthEmbedding):
            raise TypeError(
                "embedding must be a VariableWidthEmbedding (VariableWidthHead.from_plan makes a head with "
                f"weights of its own), got {checks.describe(embedding)}"
            )
        self.embedding = embedding
        self.backend = backend

    def __setattr__(self, name: str, value: Any) -> None:
        refuse_tied_weight(self, name, value)
        super().__setattr__(name, value)

    @classmethod
    def from_plan(
        cls,
        plan: WidthPlan,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> VariableWidthHead:
        """A head with weights of its own: logits have variance 1 where the hidden state's elements have."""
        embedding = VariableWidthEmbedding(plan, device=device, dtype=dtype)
        embedding._row_scale = plan.embedding_dim**-0.5  # also after a later reset_parameters
        with torch.no_grad():
            for table in embedding.tables:
                table.mul_(embedding._row_scale)
        return cls(embedding, backend)

    @property
    def plan(self) -> WidthPlan:
        """Bands and widths, those of the embedding."""
        return self.embedding.plan

    def num_parameters(self) -> int:
        """How many numbers the tables and the projections hold together."""
        return self.embedding.num_parameters()

    def forward(self, hidden: Tensor, *, _instead: Callable[[Tensor], Any] | None = None) -> Tensor:
        """hidden [..., embedding_dim] → logits [..., V] in token-id order, with gradients."""
        # The other methods come through here too, so that the module's hooks run: in one FSDP gathers the parameters.
        return self._logits(hidden) if _instead is None else _instead(hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = torch.cat(
            [
                projected @ table.t()
                for projected, table in zip(self._projected(hidden), self._tables(), strict=True)
            ],
            dim=-1,
        )
        return logits.index_select(-1, self._classes())

    def loss(
        self,
        hidden: Tensor,
        targets: Tensor,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        weight: Tensor | None = None,
    ) -> Tensor:
        """`F.cross_entropy(self(hidden), targets, …)` without the logits: see variable_width_cross_entropy.

        Args:
            hidden: [..., embedding_dim].
            targets: int64 [...], ids in [0, V) or `ignore_index`. The rest as there.
        """

        def loss(hidden: Tensor) -> Tensor:
            split = self.embedding.split_over_ranks
            return variable_width_cross_entropy(
                hidden,
                targets,
                list(self.embedding.tables) if split else self._tables(),
                self.embedding.projection_list(),
                self.embedding.token_band,
                self.embedding.token_row,
                ignore_index=ignore_index,
                reduction=reduction,
                label_smoothing=label_smoothing,
                z_loss=z_loss,
                weight=weight,
                backend=self.backend,
            )

        return self(hidden, _instead=loss)

    def log_prob(self, hidden: Tensor) -> Tensor:
        """hidden [..., embedding_dim] → log-probabilities [..., V], float32 for half types."""
        logits = self(hidden)
        return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))

    def predict(self, hidden: Tensor) -> Tensor:
        """hidden [..., embedding_dim] → the likeliest token, int64 [...], without the full logits."""
        return self.topk(hidden, 1)[1].squeeze(-1)

    @torch.no_grad()
    def topk(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits and their tokens, descending: ([..., k], int64 [..., k]), without the full logits.

        Classes are gone through in pieces of each band, of which the k best so far are kept. No gradients. Which of
        equal logits come first is not defined, as in `torch.topk`.
        """
        k = checks.integer("k", k, 1, self.plan.num_embeddings)
        return self(hidden, _instead=lambda hidden: self._topk(hidden, k))

    def _topk(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        shape = hidden.shape[:-1]
        flat = hidden.reshape(-1, hidden.shape[-1])
        classes = self._classes()
        token_of = torch.empty_like(classes)
        token_of[classes] = torch.arange(len(classes), device=classes.device)
        step = max(1024, k, _LOGITS // max(1, len(flat)))
        values: Tensor | None = None
        tokens: Tensor | None = None
        first = 0
        for projected, table in zip(self._projected(flat), self._tables(), strict=True):
            for start in range(0, len(table), step):
                logits = projected @ table[start : start + step].t()
                best, at = logits.topk(min(k, logits.shape[1]), dim=-1)
                named = token_of[first + start + at]
                if values is not None and tokens is not None:
                    best, named = torch.cat([values, best], -1), torch.cat([tokens, named], -1)
                    best, at = best.topk(min(k, best.shape[1]), dim=-1)
                    named = named.gather(-1, at)
                values, tokens = best, named
            first += len(table)
        assert values is not None
        assert tokens is not None
        return values.reshape(*shape, k), tokens.reshape(*shape, k)

    def _tables(self) -> list[Tensor]:
        tables = list(self.embedding.tables)
        if self.embedding.split_over_ranks:
            return [_plain(table) for table in tables]
        if hasattr(tables[0], "placements"):  # a DTensor, of which no hook has made a whole tensor
            raise TypeError(
                "the head's tables are sharded, for its embedding is an FSDP group of its own: shard the embedding "
                "with reshard_after_forward=False, or only the module that holds both"
            )
        return tables

    def _projected(self, hidden: Tensor) -> list[Tensor]:
        """Per band [..., width_b]."""
        if not isinstance(hidden, Tensor) or hidden.dim() == 0 or hidden.shape[-1] != self.plan.embedding_dim:
            raise ValueError(
                f"hidden must be a tensor of shape [..., {self.plan.embedding_dim}], got {checks.describe(hidden)}"
            )
        projections = self.embedding.projection_list()
        if self.embedding.split_over_ranks:
            hidden, projections = _plain(hidden), [None if p is None else _plain(p) for p in projections]
        return [hidden if p is None else hidden @ p for p in projections]

    def _classes(self) -> Tensor:
        """int64 [V]: where each token stands among the rows of all tables, one table after another."""
        band, row = self.embedding.token_band, self.embedding.token_row
        sizes = torch.tensor([0, *self.plan.band_sizes[:-1]], device=band.device)
        return sizes.cumsum(0).index_select(0, band) + row

    def extra_repr(self) -> str:
        return "" if self.backend is None else f"backend={self.backend!r}"


def _plain(tensor: Tensor) -> Tensor:
    """Of a DTensor the whole."""
    return getattr(tensor, "full_tensor", lambda: tensor)()
