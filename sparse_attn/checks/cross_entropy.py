"""Checks of the arguments of variable_width_cross_entropy, and the wording of their errors."""

from __future__ import annotations

import sys
from numbers import Real

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sparse_attn.checks.embedding import projections_of, stamp_of, tables_of, token_maps
from sparse_attn.checks.values import FLOAT_DTYPES, bare, dense, describe, first, has_values, integer

REDUCTIONS = ("mean", "sum", "none")


def bands_of(
    tables: object, projections: object, token_band: object, token_row: object
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, int]:
    """(tables, projections with [0, 0] for None, token_band and token_row int32 [V], D): each row one token's."""
    tables = tables_of(tables)
    projections, dim = projections_of(projections, tables)
    token_band, token_row = token_maps(token_band, token_row, tables)
    rows = sum(table.shape[0] for table in tables)
    if token_band.shape[0] != rows:
        raise ValueError(
            f"the tables must hold one row for each of the V = {token_band.shape[0]} tokens of token_band, "
            f"got {rows} rows"
        )
    if token_band.device.type == "cpu" and has_values(token_band) and has_values(token_row):
        _one_row_each(token_band, token_row, tuple(table.shape[0] for table in tables))
    return tables, projections, token_band, token_row.to(torch.int32), dim


# As in checks_embedding: a map that was found in order is not read again unless it changed.
_checked: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _one_row_each(token_band: Tensor, token_row: Tensor, sizes: tuple[int, ...]) -> None:
    key, stamp = stamp_of(token_band, token_row, sizes)
    if stamp is not None and _checked.get(key) == stamp:
        return
    band, row = token_band.long(), token_row.long()
    starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
    classes, tokens = (starts[band] + row).sort(stable=True)
    before, after = tokens[:-1], tokens[1:]
    bad = first(classes[:-1] == classes[1:], before, after, row[before], band[before])
    if bad is not None:
        one, other, place, number = bad[1]
        raise ValueError(
            f"every token must have a row of its own, got tokens {one} and {other} both in row {place} of band {number}"
        )
    if stamp is not None:
        _checked[key] = stamp


def hidden_of(hidden: object, tables: list[Tensor], dim: int) -> Tensor:
    """hidden [..., D] of the tables' dtype and device."""
    if not isinstance(hidden, Tensor):
        raise TypeError(f"hidden must be a tensor of shape [..., D], got {describe(hidden)}")
    if hidden.dtype not in FLOAT_DTYPES:
        raise TypeError(f"hidden must be float32, float16, bfloat16 or float64, got {describe(hidden)}")
    dense("hidden", hidden)
    if hidden.dim() == 0 or hidden.shape[-1] != dim:
        raise ValueError(f"hidden must have shape [..., D] with D = {dim}, got {describe(hidden)}")
    if hidden.dtype != tables[0].dtype:
        raise TypeError(f"hidden must have the tables' dtype {tables[0].dtype}, got {describe(hidden)}")
    if hidden.device != tables[0].device:
        raise ValueError(f"hidden must be on the tables' device {tables[0].device}, got {hidden.device}")
    return hidden


def targets_of(targets: object, hidden: Tensor, vocabulary: int, ignore_index: int) -> Tensor:
    """targets int64 [N]; on the CPU each is ignore_index or in [0, V)."""
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets must be an int64 tensor of shape [...], got {describe(targets)}")
    if targets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"targets must be int64 (or int32), got {describe(targets)}")
    dense("targets", targets)
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets must have the shape of hidden without its last dimension, {list(hidden.shape[:-1])}, "
            f"got {describe(targets)}"
        )
    if targets.device != hidden.device:
        raise ValueError(f"targets must be on hidden's device {hidden.device}, got {targets.device}")
    # Reads values: free on the CPU; elsewhere it would wait for the device.
    if targets.device.type == "cpu" and has_values(targets) and bare(targets).numel():
        low, high = (int(x) for x in bare(targets).aminmax())
        bad = None
        if low < 0 or high >= vocabulary:
            bad = first(((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index), targets)
        if bad is not None:
            place, (target,) = bad
            raise IndexError(
                f"targets must lie in [0, {vocabulary}), the vocabulary, or be ignore_index = {ignore_index}, "
                f"got {target} at position {place} of targets of shape {list(targets.shape)}"
            )
    return targets.reshape(-1).to(torch.int64)


def class_weight_of(weight: object, tables: list[Tensor], vocabulary: int) -> Tensor | None:
    """weight [V] in the dtype that the loss is computed in, or None."""
    if weight is None:
        return None
    if not isinstance(weight, Tensor) or weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"weight must be a tensor of floats of shape [V] or None, got {describe(weight)}")
    if weight.shape != (vocabulary,):
        raise ValueError(f"weight must have shape [V] = [{vocabulary}], got {describe(weight)}")
    if weight.device != tables[0].device:
        raise ValueError(f"weight must be on the tables' device {tables[0].device}, got {weight.device}")
    return weight.detach().to(torch.promote_types(tables[0].dtype, torch.float32))


def reduction_of(reduction: object) -> str:
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {describe(reduction)}"
        )
    return reduction


def factor(name: str, value: object, most: float = sys.float_info.max) -> float:
    """A plain number from 0 to `most`, by default a finite one."""
    if isinstance(value, bool) or not isinstance(value, (Real, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    # NaN fails too. Comparisons alone: math.isfinite does not take a compiler's symbolic number.
    if not 0 <= value <= most:  # type: ignore[operator]  # numbers.Real says nothing of comparisons
        bound = "finite and at least 0" if most == sys.float_info.max else f"from 0 to {most:g}"
        raise ValueError(f"{name} must be {bound}, got {value}")
    return float(value)


def ignore_index_of(value: object) -> int:
    return integer("ignore_index", value)
