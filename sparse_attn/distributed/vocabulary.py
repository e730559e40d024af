"""A vocabulary that is split over ranks: each band's rows, a chunk to each rank.

A rank looks up its own rows and gives 0 for the others (`Partial`: the sum over the ranks is the embedding). The loss
needs of all ranks three numbers per token: the maximum and the sum of the exponentials, which make the log-sum-exp, and
the target's logit, which one rank has. No logits are stored, no table is gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from sparse_attn import checks
from sparse_attn.checks import cross_entropy as check
from sparse_attn.checks import embedding as of_embedding
from sparse_attn.distributed.collectives import Group, copied, largest, rank_in, size_of, summed
from sparse_attn.nn import VariableWidthEmbedding, VariableWidthHead
from sparse_attn.ops import variable_width_cross_entropy as cross_entropy
from sparse_attn.ops.shards import Shardable
from sparse_attn.ops.variable_width_embedding import variable_width_embedding
from sparse_attn.planner import WidthPlan


def rows_of(size: int, ranks: int, rank: int) -> tuple[int, int]:
    """The rows start … stop − 1 of a band of `size` that a rank has: chunks as `Tensor.chunk` and DTensor cut."""
    step = -(-size // ranks)
    return min(rank * step, size), min((rank + 1) * step, size)


class Part:
    """One rank's part of a vocabulary in bands."""

    def __init__(
        self, sizes: Sequence[int], token_band: Tensor, token_row: Tensor, ranks: int, rank: int
    ) -> None:
        bounds = [rows_of(size, ranks, rank) for size in sizes]
        device = token_band.device
        band = token_band.to(torch.int64)
        start, stop = (torch.tensor([b[i] for b in bounds], device=device)[band] for i in (0, 1))
        row = token_row.to(torch.int64)
        self.own = (row >= start) & (row < stop)  # bool [V]
        self.sizes = [stop - start for start, stop in bounds]
        self.row = torch.where(self.own, row - start, 0).to(torch.int32)  # int32 [V], in this rank's tables
        # The rank's tokens by themselves, in the order of their ids.
        self.tokens = self.own.nonzero().squeeze(-1)  # int64 [V_r]
        self.number = torch.where(self.own, self.own.cumsum(0) - 1, 0)  # int64 [V]
        self.band_of, self.row_of = token_band[self.tokens], self.row[self.tokens]


_parts: dict[Any, tuple[Any, Part]] = {}


def _part(sizes: Sequence[int], token_band: Tensor, token_row: Tensor, group: Group) -> Part:
    """Made once for the same maps: their values do not change between calls without their version."""
    ranks, rank = size_of(group), rank_in(group)
    maps = token_band, token_row
    stamp = (*((t.data_ptr(), t._version, t.device) for t in maps), tuple(sizes), ranks, rank)
    found = _parts.get(stamp)
    if found is None:
        if len(_parts) > 64:
            _parts.clear()
        # The maps are kept with it, so that no other tensor gets their address meanwhile.
        found = _parts[stamp] = maps, Part(sizes, token_band, token_row, ranks, rank)
    return found[1]


def sizes_of_bands(token_band: Tensor, bands: int) -> list[int]:
    return torch.bincount(token_band.to(torch.int64), minlength=bands).tolist()


def vocab_parallel_embedding(
    ids: Tensor,  # int [*]
    tables: Sequence[Tensor],  # B of [n_r, width]: this rank's rows
    projections: Sequence[Tensor | None],  # B of [D, width], or None; the same on every rank
    token_band: Tensor,  # int [V], of the whole vocabulary
    token_row: Tensor,  # int [V]
    *,
    group: Group = None,
    padding_idx: int | None = None,
    reduce: bool = True,
    backend: str | None = None,
) -> Tensor:
    """:func:`sparse_attn.variable_width_embedding` of tables of which each rank has a chunk of each band's rows.

    Args:
        ids: int [*] in [0, V), the same on every rank of the group.
        tables: this rank's rows of each band, ⌈n / ranks⌉ of them, fewer or none on the last ranks.
        projections, token_band, token_row: as there; no two tokens share a row.
        group: the ranks; None is the default group.
        padding_idx: as there.
        reduce: False leaves the sum over the ranks to the caller.

    Returns:
        [*ids.shape, D] on every rank; without reduce what this rank has of it, 0 for the tokens of others.

    Gradients: of tables, their rows'; of projections, this rank's part, whose sum over the ranks is the gradient.
    """
    tables, dim, token_band, token_row, sizes = _whole_maps(tables, projections, token_band, token_row)
    ids = of_embedding.ids_of(ids, len(token_band), tables[0].device)
    padding = of_embedding.padding_of(padding_idx, len(token_band))
    reduce = checks.boolean("reduce", reduce)
    part = _part(sizes, token_band, token_row, group)
    _check_rows(tables, part)
    mine = part.own[ids.to(torch.int64)]
    if padding >= 0:
        mine = mine & (ids != padding)
    # Only what is this rank's own is projected: those tokens, one after another.
    at = mine.flatten().nonzero().squeeze(-1)
    tokens = part.number[ids.flatten()[at].to(torch.int64)]
    out = tables[0].new_zeros((ids.numel(), dim))
    if len(part.tokens):
        own = variable_width_embedding(
            tokens, tables, projections, part.band_of, part.row_of, backend=backend
        )
        out = out.index_put((at,), own)
    else:
        out = out + sum(t.sum() for t in tables)  # of no rows: 0, with a gradient
    out = out.view(*ids.shape, dim)
    return summed(out, group, "embedding") if reduce else out


def vocab_parallel_cross_entropy(
    hidden: Tensor,  # [..., D]
    targets: Tensor,  # int64 [...]
    tables: Sequence[Tensor],  # B of [n_r, width]: this rank's rows
    projections: Sequence[Tensor | None],  # B of [D, width], or None
    token_band: Tensor,  # int [V], of the whole vocabulary
    token_row: Tensor,  # int [V]
    *,
    group: Group = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    weight: Tensor | None = None,  # [V]
    backend: str | None = None,
    sum_gradients: bool = True,
) -> Tensor:
    r""":func:`sparse_attn.variable_width_cross_entropy` of tables of which each rank has a chunk of each band's rows.

    With :math:`m = \max_r \mathrm{lse}_r` and the target's logit :math:`z_t`, which its rank alone has:

    .. math:: \mathrm{lse} = m + \ln \sum_r e^{\mathrm{lse}_r - m}, \qquad \mathrm{loss} = \mathrm{lse} - \sum_r z_t

    Args:
        hidden, targets: the same on every rank of the group.
        tables, projections, token_band, token_row, group: as in :func:`vocab_parallel_embedding`.
        ignore_index, reduction, label_smoothing, z_loss, weight, backend: as there.
        sum_gradients: the gradient of hidden is summed over the ranks; False leaves that to the caller.

    Returns:
        as there, the same on every rank.

    Gradients: of tables, their rows'; of projections, this rank's part, whose sum over the ranks is the gradient.
    """
    tables, dim, token_band, token_row, sizes = _whole_maps(tables, projections, token_band, token_row)
    sum_gradients = checks.boolean("sum_gradients", sum_gradients)
    vocabulary = len(token_band)
    hidden = check.hidden_of(hidden, tables, dim)
    ignore_index = check.ignore_index_of(ignore_index)
    part = _part(sizes, token_band, token_row, group)
    _check_rows(tables, part)
    shape = hidden.shape[:-1]
    targets = check.targets_of(targets, hidden, vocabulary, ignore_index)
    reduction = check.reduction_of(reduction)
    label_smoothing = check.factor("label_smoothing", label_smoothing, 1.0)
    z_loss = check.factor("z_loss", z_loss)
    weight = check.class_weight_of(weight, tables, vocabulary)
    flat = hidden.reshape(-1, dim)
    if sum_gradients:
        flat = copied(flat, group, "hidden, gradient")
    active = targets != ignore_index
    tokens = torch.where(active, targets, 0)
    lse, picked = _own_logits(flat, tokens, active, part, tables, projections, backend)
    top = largest(lse, group, "loss")
    top = torch.where(top == -torch.inf, 0.0, top)
    of_target = torch.where(active & part.own[tokens], picked, 0.0)
    both = summed(torch.stack(((lse - top).exp(), of_target)), group, "loss")
    total = torch.where(active, both[0].log() + top, 0.0)
    factor = total.new_ones(()) if weight is None else weight.to(total.dtype)[tokens]
    value = (1 - label_smoothing) * factor * (total - both[1])
    if label_smoothing > 0:
        # Σ_v w_v z_v over this rank's classes: the hidden state with one vector per band.
        weighed = summed(_weighed(flat, active, part, tables, projections, weight), group, "loss")
        whole = vocabulary if weight is None else weight.to(total.dtype).sum()
        value = value + label_smoothing / vocabulary * (whole * total - weighed)
    loss = torch.where(active, value, 0.0)
    if z_loss > 0:
        loss = loss + z_loss * total.square()
    if reduction == "none":
        return loss.reshape(shape)
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / torch.where(active, factor.expand(active.shape), 0.0).sum()


def _own_logits(
    hidden: Tensor,  # [N, D]
    tokens: Tensor,  # int64 [N]
    active: Tensor,  # bool [N]
    part: Part,
    tables: Sequence[Tensor],
    projections: Sequence[Tensor | None],
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """(log-sum-exp over this rank's classes [N], the target's logit where it is one of them [N])."""
    compute = torch.promote_types(hidden.dtype, torch.float32)
    if not len(part.tokens):  # of no rows: nothing, with a gradient of 0
        nothing = torch.stack([t.sum() for t in tables]).sum().to(compute)
        zero = torch.where(active, hidden.to(compute).sum(-1), 0.0) * 0.0 + nothing
        return torch.where(active, -torch.inf, zero), zero
    # A target of another rank stands for any: its loss is not looked at, its log-sum-exp is.
    own = torch.where(active, torch.where(part.own[tokens], part.number[tokens], 0), -100)
    whole, present, band, row, _ = check.bands_of(tables, projections, part.band_of, part.row_of)
    call = cross_entropy.OP.on(cross_entropy.OP.choose(hidden, backend))
    loss, lse = call(hidden, own, whole, present, band, row, None, -100, 0.0)
    return lse, lse - loss


def _weighed(
    hidden: Tensor,
    active: Tensor,
    part: Part,
    tables: Sequence[Tensor],
    projections: Sequence[Tensor | None],
    weight: Tensor | None,
) -> Tensor:  # [N]
    compute = torch.promote_types(hidden.dtype, torch.float32)
    hidden = torch.where(active.unsqueeze(-1), hidden.to(compute), 0.0)
    total = hidden.new_zeros(len(hidden))
    for b, (table, projection) in enumerate(zip(tables, projections, strict=True)):
        rows = table.to(compute)
        if weight is None:
            row = rows.sum(0)
        else:
            inside = part.band_of == b
            of_rows = weight.new_zeros(len(table)).scatter(
                0, part.row_of[inside].long(), weight[part.tokens[inside]]
            )
            row = of_rows.to(compute) @ rows
        total = total + (hidden @ row if projection is None else hidden @ (projection.to(compute) @ row))
    return total


def _whole_maps(
    tables: Sequence[Tensor], projections: Sequence[Tensor | None], token_band: Tensor, token_row: Tensor
) -> tuple[list[Tensor], int, Tensor, Tensor, list[int]]:
    """(tables, D, token_band, token_row, the rows of each band on all ranks together): each token has a row."""
    tables = of_embedding.tables_of(tables)
    _, dim = of_embedding.projections_of(projections, tables)
    of_embedding.map_tensors(token_band, token_row, tables[0].device)
    on_cpu = token_band.device.type == "cpu"  # where reading values makes nobody wait
    low, high = (int(n) for n in token_band.aminmax()) if on_cpu else (0, 0)
    if low < 0 or high >= len(tables):
        raise ValueError(
            f"token_band must lie in [0, {len(tables)}), the number of tables, got {low if low < 0 else high}"
        )
    sizes = sizes_of_bands(token_band, len(tables))
    if on_cpu:
        of_embedding.check_map_values(token_band, token_row, tuple(sizes))
    return tables, dim, token_band, token_row, sizes


def _check_rows(tables: Sequence[Tensor], part: Part) -> None:
    got = [len(table) for table in tables]
    if got != part.sizes:
        raise ValueError(f"tables must have this rank's {part.sizes} rows of the bands, got {got}")


def on_dtensors(call: Shardable, arguments: dict[str, Any]) -> Any:
    """The embedding and its loss of DTensors: tokens split in any way, tables whole or split by rows."""
    lookup = call.function.__name__ == "variable_width_embedding"
    tables, projections = list(arguments["tables"]), list(arguments["projections"])
    tokens = arguments["ids" if lookup else "hidden"]
    lead = next(t for t in (tokens, *tables) if isinstance(t, DTensor))
    mesh = lead.device_mesh
    for name, value in (
        ("ids" if lookup else "hidden", tokens),
        *((f"tables[{b}]", t) for b, t in enumerate(tables)),
    ):
        if not isinstance(value, DTensor):
            raise TypeError(
                f"{name} must be a DTensor, as other arguments are, got {checks.describe(value)}: "
                "DTensor.from_local(…, [Replicate()]) where it is the same on every rank"
            )
    of_tokens = _placements(tokens, mesh)
    of_tables = _placements(tables[0], mesh)
    for m, (token, table) in enumerate(zip(of_tokens, of_tables, strict=True)):
        last = not lookup and isinstance(token, Shard) and token.dim % tokens.dim() == tokens.dim() - 1
        if last or (isinstance(table, Shard) and table.dim != 0):
            raise ValueError(
                "hidden must be whole in its last dimension and tables may be split by rows, got "
                f"{token} and {table} over dimension {m} of the mesh"
            )
        if isinstance(token, Shard) and isinstance(table, Shard):
            raise ValueError(
                f"dimension {m} of the mesh splits both the tokens ({token}) and the tables ({table}): one of the two"
            )
    split = [m for m, p in enumerate(of_tables) if isinstance(p, Shard)]
    if len(split) > 1:
        raise ValueError("tables may be split over one dimension of the mesh, got several")
    replicated = [Replicate()] * mesh.ndim

    def local(t: Tensor | None, placements: Sequence[Placement]) -> Tensor | None:
        if t is None:
            return None
        if not isinstance(t, DTensor):
            t = DTensor.from_local(t, mesh, replicated, run_check=False)
        if tuple(t.placements) != tuple(placements):
            t = t.redistribute(placements=placements)
        # What is whole where the work is split has a gradient from each part.
        busy = [
            isinstance(a, Shard) or isinstance(b, Shard) for a, b in zip(of_tokens, of_tables, strict=True)
        ]
        grads = [Partial() if p.is_replicate() and b else p for p, b in zip(placements, busy, strict=True)]
        return t.to_local(grad_placements=grads)

    parts = dict(arguments)
    parts["tables"] = [local(t, of_tables) for t in tables]
    parts["projections"] = [local(p, replicated) for p in projections]
    for name in ("token_band", "token_row", "weight"):
        if isinstance(parts.get(name), DTensor):
            parts[name] = parts[name].full_tensor()
    parts["ids" if lookup else "hidden"] = local(tokens, of_tokens)
    if lookup:
        function: Callable[..., Tensor] = call.function
        out_placements = list(of_tokens)
        if split:
            if parts.pop("sparse", False):
                raise ValueError("sparse=True goes with tables that are whole")
            function = partial(vocab_parallel_embedding, group=mesh.get_group(split[0]), reduce=False)
            out_placements[split[0]] = Partial()
        shape = (*tokens.shape, next((p.shape[0] for p in projections if p is not None), tables[0].shape[1]))
        return _whole(function(**parts), mesh, out_placements, shape)

    parts["targets"] = local(arguments["targets"], of_tokens)
    reduction = check.reduction_of(parts.pop("reduction", "mean"))
    function = call.function
    if split:
        function = partial(vocab_parallel_cross_entropy, group=mesh.get_group(split[0]), sum_gradients=False)
    loss = _whole(function(**parts, reduction="none"), mesh, of_tokens, arguments["targets"].shape)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    active = parts["targets"] != parts.get("ignore_index", -100)
    weight = parts.get("weight")
    counted = (
        active.to(loss.dtype)
        if weight is None
        else torch.where(active, weight.to(loss.dtype)[torch.where(active, parts["targets"], 0)], 0.0)
    )
    return loss.sum() / _whole(counted, mesh, of_tokens, arguments["targets"].shape).sum()


def _whole(local: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int]) -> DTensor:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    shape = torch.Size(shape)
    return DTensor.from_local(
        local.contiguous(),
        mesh,
        placements,
        run_check=False,
        shape=shape,
        stride=tuple(strides[: len(shape)]),
    )


def _placements(tensor: Tensor, mesh: DeviceMesh) -> tuple[Placement, ...]:
    if not isinstance(tensor, DTensor):
        return (Replicate(),) * mesh.ndim
    return tuple(Replicate() if p.is_partial() else p for p in tensor.placements)


class VocabParallel(ParallelStyle):
    """For `parallelize_module`: splits the bands of a VariableWidthEmbedding, or of a VariableWidthHead, over the mesh.

    Tables become DTensors with `Shard(0)`, projections are replicated; a tied head follows its embedding. The embedding
    takes and gives plain tensors that are the same on every rank of the mesh, or with `local_output=False` gives a
    DTensor `Partial`, for a plan that goes on with it. The head's `loss` gives the loss, the same on every rank; its
    other methods, which need all logits, gather the tables.

    Example:
        parallelize_module(model, mesh["tensor"], {"embedding": VocabParallel(), "head": VocabParallel()})
    """

    def __init__(self, *, local_output: bool = True) -> None:
        super().__init__()
        self.local_output = local_output

    def _apply(self, module: torch.nn.Module, device_mesh: DeviceMesh) -> torch.nn.Module:
        embedding = module.embedding if isinstance(module, VariableWidthHead) else module
        if not isinstance(embedding, VariableWidthEmbedding):
            raise TypeError(
                "VocabParallel is for a VariableWidthEmbedding or a VariableWidthHead, got "
                f"{checks.describe(module)}"
            )
        if embedding.sparse:
            raise ValueError(
                "VocabParallel has dense gradients: make the VariableWidthEmbedding with sparse=False"
            )
        for parameters, placement in ((embedding.tables, Shard(0)), (embedding.projections, Replicate())):
            for i, parameter in enumerate(parameters):
                if not isinstance(parameter, DTensor):
                    whole = distribute_tensor(parameter.detach(), device_mesh, [placement])
                    parameters[i] = torch.nn.Parameter(whole, requires_grad=parameter.requires_grad)
        embedding.split_over_ranks = True
        module.register_forward_pre_hook(self._shared_input(device_mesh))
        if self.local_output:
            module.register_forward_hook(_local)
        return module

    @staticmethod
    def _shared_input(mesh: DeviceMesh) -> Callable[[Any, tuple], tuple]:
        def share(_: Any, given: tuple) -> tuple:
            return tuple(
                DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)
                if isinstance(t, Tensor) and not isinstance(t, DTensor)
                else t
                for t in given
            )

        return share


def _local(_: Any, __: Any, output: Any) -> Any:
    if not isinstance(output, DTensor):
        return output
    return output.redistribute(placements=[Replicate()] * output.device_mesh.ndim).to_local()


def split_plan(plan: WidthPlan, ranks: int) -> list[int]:
    """Numbers of tables and projections on each rank, of a plan whose bands are split over so many.

    A band of n rows gives ⌈n / ranks⌉ to the first ranks; projections are whole on each.

    Example:
        >>> from sparse_attn import WidthPlan
        >>> from sparse_attn.distributed import split_plan
        >>> split_plan(WidthPlan.from_cutoffs(100, 8, cutoffs=[10], widths=[8, 2]), 2)
        [146, 146]
    """
    if not isinstance(plan, WidthPlan):
        raise TypeError(f"plan must be a sparse_attn.WidthPlan, got {checks.describe(plan)}")
    ranks = int(checks.integer("ranks", ranks, 1))
    projections = sum(plan.embedding_dim * w for w in plan.widths if w != plan.embedding_dim)
    found = []
    for rank in range(ranks):
        rows = [stop - start for start, stop in (rows_of(n, ranks, rank) for n in plan.band_sizes)]
        found.append(projections + sum(n * w for n, w in zip(rows, plan.widths, strict=True)))
    return found
