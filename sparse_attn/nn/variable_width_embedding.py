"""An embedding module whose rows are wide for frequent tokens and narrow for rare ones."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_attn import checks
from sparse_attn.checks.embedding import padding_of
from sparse_attn.files import stored
from sparse_attn.nn.whole_state import WholeState
from sparse_attn.ops.variable_width_embedding import variable_width_embedding
from sparse_attn.planner import WidthPlan
from sparse_attn.planner.low_rank import FactorizationReport, factorize


class NoWeight(AttributeError, NotImplementedError):
    """An AttributeError, so that `hasattr` is False."""


_TIED = (
    "{} has tables of several widths and no `weight` that could be tied: "
    "model.set_output_embeddings(VariableWidthHead(embedding)) with config.tie_word_embeddings = False is a tied head"
)


def refuse_tied_weight(module: torch.nn.Module, name: str, value: Any) -> None:
    """Tying sets the `weight` of one module in another: here it would be a parameter that nothing reads."""
    if name == "weight" and isinstance(value, Tensor):
        raise NotImplementedError(_TIED.format(type(module).__name__))


class VariableWidthEmbedding(WholeState):
    """In place of `nn.Embedding`: ids of any shape in, [*ids.shape, embedding_dim] out, with fewer parameters.

    A :class:`~sparse_attn.planner.WidthPlan` says which token is in which band and how wide each band's rows are;
    see :func:`sparse_attn.variable_width_embedding` for the formula.

    Args:
        plan: bands and widths.
        padding_idx: a token whose embedding is 0 and gets no gradient; a negative one counts from the end.
        sparse: give the tables `torch.sparse_coo` gradients, as `nn.Embedding(sparse=True)` does; not under
            DistributedDataParallel.
        device, dtype: of the parameters.
        backend: force one wing ("cpu", "cuda", "triton", "reference"); None chooses.

    Attributes:
        tables: ParameterList, one [n_b, width_b] per band.
        projections: ParameterList of [embedding_dim, width_b] for the bands narrower than the model, in band order;
            `projection_list()` has None in the places of the others.
        token_band, token_row: int32 buffers [V], saved in the state dict, which so carries the plan. They are made of
            the plan again by `to_empty` and by `reset_parameters`.
        plan: the WidthPlan.
        report: what `from_embedding` lost, else None.

    Initialisation: rows are N(0, 1) as those of `nn.Embedding`, projections N(0, 1 / width), so that in every
    band each element of the output has mean 0 and variance 1.

    Raises:
        TypeError, ValueError: a wrong argument, named in the message.

    Example:
        >>> import torch, sparse_attn
        >>> from sparse_attn.planner import WidthPlan
        >>> plan = WidthPlan.from_cutoffs(1000, 64, cutoffs=[100], widths=[64, 8])
        >>> embedding = sparse_attn.nn.VariableWidthEmbedding(plan)
        >>> embedding(torch.randint(1000, (2, 16))).shape
        torch.Size([2, 16, 64])
    """

    token_band: Tensor
    token_row: Tensor
    split_over_ranks = (
        False  # whether tables are DTensors of one vocabulary (sparse_attn.distributed.VocabParallel)
    )
    _row_scale = 1.0  # of new rows; VariableWidthHead.from_plan has another

    def __init__(
        self,
        plan: WidthPlan,
        padding_idx: int | None = None,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(plan, WidthPlan):
            raise TypeError(f"plan must be a WidthPlan, got {checks.describe(plan)}")
        if padding_idx is not None:
            padding_idx = padding_of(padding_idx, plan.num_embeddings)
        self.plan = plan
        self.padding_idx = padding_idx
        self.sparse = checks.boolean("sparse", sparse)
        self.backend = backend
        self.report: FactorizationReport | None = None

        def empty(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.tables = torch.nn.ParameterList(
            empty(size, width) for size, width in zip(plan.band_sizes, plan.widths, strict=True)
        )
        self.projections = torch.nn.ParameterList(
            empty(plan.embedding_dim, width) for width in plan.widths if width != plan.embedding_dim
        )
        device = self.tables[0].device
        self.register_buffer("token_band", plan.token_band.to(device, copy=True))
        self.register_buffer("token_row", plan.token_row.to(device, copy=True))
        self.reset_parameters()

    @classmethod
    def from_counts(
        cls,
        counts: Tensor | Sequence[float],
        embedding_dim: int,
        *,
        budget: int | None = None,
        ratio: float | None = None,
        num_bands: int = 4,
        **options: Any,
    ) -> VariableWidthEmbedding:
        """A new embedding with the plan that `sparse_attn.plan_widths` makes from how often each token occurs, [V].

        Args:
            counts, embedding_dim, budget, ratio, num_bands: as in :func:`sparse_attn.plan_widths`.
            options: of the constructor: padding_idx, sparse, device, dtype, backend.
        """
        plan = WidthPlan.from_counts(counts, embedding_dim, budget=budget, ratio=ratio, num_bands=num_bands)
        return cls(plan, **options)

    @classmethod
    def from_embedding(
        cls,
        embedding: torch.nn.Embedding,
        counts: Tensor | Sequence[float],
        *,
        budget: int | None = None,
        ratio: float | None = None,
        num_bands: int = 4,
        plan: WidthPlan | None = None,
        backend: str | None = None,
    ) -> VariableWidthEmbedding:
        """A trained `nn.Embedding` with fewer parameters: the truncated SVD of each band, weighted by frequency.

        Args:
            embedding: padding_idx, sparse, dtype, device and requires_grad are taken over with the weight.
            counts: how often each token occurs, [V].
            budget, ratio, num_bands: as in :func:`sparse_attn.plan_widths`, which makes the plan;
            plan: or a plan to use instead.
            backend: of the module.

        The result's `report` says what is lost, per band and overall; print it for a table.

        Example:
            >>> import torch, sparse_attn
            >>> trained, counts = torch.nn.Embedding(1000, 64), 1e6 / torch.arange(1, 1001)
            >>> embedding = sparse_attn.nn.VariableWidthEmbedding.from_embedding(trained, counts, ratio=0.5)
            >>> embedding.num_parameters() <= 32000
            True
        """
        if not isinstance(embedding, torch.nn.Embedding):
            raise TypeError(f"embedding must be an nn.Embedding, got {checks.describe(embedding)}")
        if embedding.max_norm is not None or embedding.scale_grad_by_freq:
            raise ValueError(
                "embedding must have max_norm=None and scale_grad_by_freq=False, got "
                f"max_norm={embedding.max_norm}, scale_grad_by_freq={embedding.scale_grad_by_freq}"
            )
        if plan is None:
            plan = WidthPlan.from_counts(
                counts, embedding.embedding_dim, budget=budget, ratio=ratio, num_bands=num_bands
            )
        elif budget is not None or ratio is not None:
            raise ValueError("plan must not be given together with budget or ratio, which make one")
        weight = embedding.weight
        tables, projections, report = factorize(weight, counts, plan)
        module = cls(plan, embedding.padding_idx, embedding.sparse, weight.device, weight.dtype, backend)
        with torch.no_grad():
            for parameter, value in zip(module.tables, tables, strict=True):
                parameter.copy_(value)
            present = [p for p in projections if p is not None]
            for parameter, value in zip(module.projections, present, strict=True):
                parameter.copy_(value)
        module.requires_grad_(weight.requires_grad)
        module.report = report
        return module

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            if sys._getframe(1).f_code is torch.nn.Module.get_parameter.__code__:
                # Whoever asks for a parameter by its name (transformers, to tie it) would hide our words.
                raise NotImplementedError(_TIED.format(type(self).__name__))
            raise NoWeight(
                "VariableWidthEmbedding has tables of several widths and no `weight`: VariableWidthHead(embedding) is "
                "a tied head, embedding.resize(…) makes the vocabulary larger, embedding.full_table() is a weight"
            )
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        refuse_tied_weight(self, name, value)
        super().__setattr__(name, value)

    @property
    def num_embeddings(self) -> int:
        """V, the size of the vocabulary."""
        return self.plan.num_embeddings

    @property
    def embedding_dim(self) -> int:
        """D, the model's width."""
        return self.plan.embedding_dim

    def num_parameters(self) -> int:
        """How many numbers the tables and the projections hold together."""
        return self.plan.num_parameters()

    def projection_list(self) -> list[Tensor | None]:
        """One projection [embedding_dim, width_b] per band, None where the rows are as wide as the model."""
        present = iter(self.projections)
        return [None if width == self.embedding_dim else next(present) for width in self.plan.widths]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """New random values, with the variance of nn.Embedding's output in every band; a padding row of 0.

        The maps are made of the plan again, so that a module from the meta device is whole after `to_empty` and this.
        """
        for table in self.tables:
            torch.nn.init.normal_(table)
            if self._row_scale != 1.0:
                table.mul_(self._row_scale)
        for projection in self.projections:
            torch.nn.init.normal_(projection, std=projection.shape[1] ** -0.5)
        if self.padding_idx is not None:
            band = int(self.plan.token_band[self.padding_idx])
            self.tables[band][int(self.plan.token_row[self.padding_idx])] = 0
        self._adopt(self.plan)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VariableWidthEmbedding:
        maps = self.token_band, self.token_row
        super()._apply(fn, recurse)
        # `to_empty` (also of skip_init, FSDP, …) leaves unwritten memory, `type` makes floats of them.
        if self.token_band is not maps[0] or self.token_row is not maps[1]:
            self._adopt(self.plan)
        return self

    def forward(self, ids: Tensor) -> Tensor:
        """ids int [*] → [*, embedding_dim]."""
        if self.sparse and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._refuse_data_parallel()
        return variable_width_embedding(
            ids,
            list(self.tables),
            self.projection_list(),
            self.token_band,
            self.token_row,
            padding_idx=self.padding_idx,
            sparse=self.sparse,
            backend=self.backend,
        )

    def _refuse_data_parallel(self) -> None:
        """DistributedDataParallel takes sparse gradients of nn.Embedding and nn.EmbeddingBag alone."""
        around = torch.nn.parallel.DistributedDataParallel._get_active_ddp_module()
        if around is None:
            return
        reduced = {id(p) for p in around._module_parameters}
        if any(table.requires_grad and id(table) in reduced for table in self.tables):
            raise ValueError(
                "sparse=True cannot be reduced by DistributedDataParallel, which takes sparse gradients of "
                "nn.Embedding alone: make the VariableWidthEmbedding with sparse=False"
            )

    def full_table(self) -> Tensor:
        """The table [V, embedding_dim] that an nn.Embedding would need for the same outputs, with gradients."""
        return self(torch.arange(self.num_embeddings, device=self.token_band.device))

    @torch.no_grad()
    def resize(self, new_num_embeddings: int, band: int | None = None) -> VariableWidthEmbedding:
        """Grows the vocabulary in place: the new ids get new rows, and every old one keeps its own. Returns self.

        Args:
            new_num_embeddings: at least the present number.
            band: where the new tokens go; None: the narrowest band, the last of those.

        That band's table becomes a new Parameter: an optimizer made before still holds the old one.
        """
        new_num_embeddings = int(
            checks.integer("new_num_embeddings", new_num_embeddings, self.num_embeddings)
        )
        widths = self.plan.widths
        if band is None:
            band = max(range(len(widths)), key=lambda b: (-widths[b], b))
        band = int(checks.integer("band", band, 0, len(widths) - 1))
        added = new_num_embeddings - self.num_embeddings
        if added == 0:
            return self
        new_tokens = torch.full((added,), band, dtype=torch.int32, device="cpu")
        plan = WidthPlan(self.embedding_dim, widths, torch.cat([self.plan.token_band, new_tokens]))
        old = self.tables[band]
        table = torch.cat([old, old.new_empty((added, old.shape[1])).normal_()])
        # Only now, when nothing can fail any more.
        self._adopt(plan)
        self.tables[band] = torch.nn.Parameter(table, requires_grad=old.requires_grad)
        return self

    def _adopt(self, plan: WidthPlan) -> None:
        """Another plan with the same widths, for which the tables are right already."""
        device = self.token_band.device
        maps = plan.token_band.to(device, copy=True), plan.token_row.to(device, copy=True)
        self.plan = plan
        self.token_band, self.token_row = maps

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Takes over which token is in which band; the bands' sizes and widths must be this module's."""
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        band = _readable(state_dict.get(f"{prefix}token_band"))
        if band is not None and not torch.equal(band.to("cpu", torch.int32), self.plan.token_band):
            self.plan = WidthPlan(self.embedding_dim, self.plan.widths, band)  # its own, if it was refused

    def _why_not_load(self, state: dict[str, Any], prefix: str) -> str | None:
        refusal = super()._why_not_load(state, prefix)
        band, row = (_readable(state.get(f"{prefix}{name}")) for name in ("token_band", "token_row"))
        if refusal is not None:
            return refusal
        plan = self.plan
        if band is not None:
            try:
                plan = WidthPlan(self.embedding_dim, plan.widths, band)
            except (TypeError, ValueError) as error:
                return f"{prefix}{error}"
            if plan.band_sizes != self.plan.band_sizes:
                return (
                    f"{prefix}token_band puts {list(plan.band_sizes)} tokens into the bands, "
                    f"whose tables have {list(self.plan.band_sizes)} rows"
                )
        if row is not None:
            wrong = (row.cpu() != plan.token_row).nonzero()
            if len(wrong):
                token = int(wrong[0])
                return (
                    f"{prefix}token_row must number the tokens of each band in the order of their ids, got "
                    f"{row[token].item()} for token {token}, which has row {int(plan.token_row[token])} of its band"
                )
        return None

    @classmethod
    def from_state_dict(
        cls, state_dict: dict[str, Tensor], prefix: str = "", **options: Any
    ) -> VariableWidthEmbedding:
        """The module that a state dict was taken from, plan included.

        Args:
            state_dict: of this module, or of one that holds it under `prefix` ("wte." for example).
            options: of the constructor, except plan and dtype.
        """
        own = {name.removeprefix(prefix): v for name, v in state_dict.items() if name.startswith(prefix)}
        if "token_band" not in own or "tables.0" not in own:
            raise ValueError(
                f"state_dict must hold {prefix}token_band and {prefix}tables.0, got the entries {list(own)[:6]}"
            )
        own = {n: v for n, v in own.items() if n.startswith(("token_", "tables.", "projections."))}
        tables: list[Tensor] = []
        for b in range(sum(name.startswith("tables.") for name in own)):
            table = own.get(f"tables.{b}")
            if not isinstance(table, Tensor) or table.dim() != 2 or table.shape[1] == 0:
                raise ValueError(
                    f"{prefix}tables.{b} must be a tensor [n, width], got {checks.describe(table)}"
                )
            tables.append(stored(f"{prefix}tables.{b}", table))
        widths = [table.shape[1] for table in tables]
        dim = own["projections.0"].shape[0] if "projections.0" in own else widths[0]
        plan = WidthPlan(dim, widths, own["token_band"])
        sizes = [len(table) for table in tables]
        if list(plan.band_sizes) != sizes:  # before anything of the plan's sizes is allocated
            raise ValueError(
                f"{prefix}token_band puts {list(plan.band_sizes)} tokens into the bands, whose tables have {sizes} rows"
            )
        module = cls(plan, dtype=tables[0].dtype, **options)
        module.load_state_dict(own)
        return module

    def extra_repr(self) -> str:
        options = "".join(
            f"\n{name}={value!r}"
            for name, value in (
                ("padding_idx", self.padding_idx),
                ("sparse", self.sparse or None),
                ("backend", self.backend),
            )
            if value is not None
        )
        return f"{self.plan!r}{options}"

    def __repr__(self) -> str:
        # The lists of parameters would say the plan's table again.
        lines = "\n  ".join(self.extra_repr().splitlines())
        return f"{type(self).__name__}(\n  {lines}\n)"


def _readable(entry: Tensor | None) -> Tensor | None:
    """An entry of a state dict, where it is there and has values."""
    return None if entry is None or entry.device.type == "meta" else entry
