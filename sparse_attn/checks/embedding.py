"""Checks of the arguments of the variable-width embedding, and the wording of their errors."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sparse_attn.checks.values import FLOAT_DTYPES, bare, dense, describe, first, has_values, integer

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def tables_of(tables: object) -> list[Tensor]:
    """The tables [n, width] of the bands, of one dtype and on one device."""
    if isinstance(tables, Tensor) or not hasattr(tables, "__iter__"):
        raise TypeError(f"tables must be a sequence of tensors [n, width], got {describe(tables)}")
    tables = list(tables)
    if not tables:
        raise ValueError("tables must hold one table [n, width] per band, at least one, got none")
    for b, table in enumerate(tables):
        name = f"tables[{b}]"
        if not isinstance(table, Tensor):
            raise TypeError(f"{name} must be a tensor [n, width], got {describe(table)}")
        if table.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {describe(table)}")
        dense(name, table)
        if table.dim() != 2 or table.shape[1] == 0:
            raise ValueError(
                f"{name} must have shape [n, width] with width at least 1, got {describe(table)}"
            )
        if table.dtype != tables[0].dtype:
            raise TypeError(f"all tables must have one dtype, got {tables[0].dtype} and {table.dtype}")
        if table.device != tables[0].device:
            raise ValueError(f"all tables must be on one device, got {tables[0].device} and {table.device}")
    return tables


def projections_of(projections: object, tables: list[Tensor]) -> tuple[list[Tensor], int]:
    """(one projection [D, width] per table, a tensor [0, 0] for None; the model width D)."""
    if isinstance(projections, Tensor) or not hasattr(projections, "__iter__"):
        raise TypeError(
            f"projections must be a sequence of tensors [D, width] or None, got {describe(projections)}"
        )
    projections = list(projections)
    if len(projections) != len(tables):
        raise ValueError(
            f"projections must have one entry per table (None where the width is the model's), "
            f"got {len(projections)} projections for {len(tables)} tables"
        )
    dims = {}
    for b, (projection, table) in enumerate(zip(projections, tables, strict=True)):
        if projection is None:
            dims[b] = table.shape[1]
            projections[b] = table.new_empty((0, 0))
            continue
        name = f"projections[{b}]"
        if not isinstance(projection, Tensor):
            raise TypeError(f"{name} must be a tensor [D, width] or None, got {describe(projection)}")
        dense(name, projection)
        if projection.dtype != table.dtype:
            raise TypeError(f"{name} must have the tables' dtype {table.dtype}, got {describe(projection)}")
        if projection.device != table.device:
            raise ValueError(f"{name} must be on the tables' device {table.device}, got {projection.device}")
        if projection.dim() != 2 or projection.shape[0] == 0 or projection.shape[1] != table.shape[1]:
            raise ValueError(
                f"{name} must have shape [D, width] with width {table.shape[1]} as its table has, "
                f"got {describe(projection)}"
            )
        dims[b] = projection.shape[0]
    for b, dim in dims.items():
        if dim != dims[0]:
            raise ValueError(
                f"all bands must come to one width (a projection's rows, or the table's width where there is "
                f"none), got {dims[0]} for band 0 and {dim} for band {b}"
            )
    return projections, dims[0]


def token_maps(token_band: Any, token_row: Any, tables: list[Tensor]) -> tuple[Tensor, Tensor]:
    """token_band as int32 [V] and token_row as int32 or int64 [V], on the tables' device and naming rows there."""
    map_tensors(token_band, token_row, tables[0].device)
    if token_band.device.type == "cpu" and has_values(token_band) and has_values(token_row):
        check_map_values(token_band, token_row, tuple(len(table) for table in tables))
    if token_band.dtype != torch.int32:
        token_band = token_band.to(torch.int32)
    if token_row.dtype not in (torch.int32, torch.int64):
        token_row = token_row.to(torch.int32)
    return token_band, token_row


def map_tensors(token_band: Any, token_row: Any, device: torch.device) -> None:
    """That both are integers [V] on the tables' device."""
    for name, value in (("token_band", token_band), ("token_row", token_row)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor of integers of shape [V], got {describe(value)}")
        if value.dtype not in _INTEGERS:
            raise TypeError(f"{name} must hold integers, got {describe(value)}")
        if value.dim() != 1 or value.shape[0] == 0:
            raise ValueError(f"{name} must have shape [V] with V at least 1, got {describe(value)}")
        if value.device != device:
            raise ValueError(f"{name} must be on the tables' device {device}, got {value.device}")
    if token_band.shape != token_row.shape:
        raise ValueError(
            f"token_band and token_row must have one length V, got {token_band.shape[0]} and "
            f"{token_row.shape[0]}"
        )


class Checked:
    """Pairs of maps that were found in order.

    Reading all of a vocabulary's maps at every call would cost more than looking up a few tokens. A change in place
    raises a tensor's version, other memory has another address, and another tensor is not the one that was looked at.
    """

    def __init__(self) -> None:
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # token_band → (token_row, stamp)

    def __contains__(self, maps: tuple[Tensor, Tensor, tuple[int, ...]]) -> bool:
        band, row = bare(maps[0]), bare(maps[1])
        found = self._known.get(band)
        return found is not None and found[0]() is row and found[1] == _stamp(band, row, maps[2])

    def add(self, token_band: Tensor, token_row: Tensor, sizes: tuple[int, ...]) -> None:
        band, row = bare(token_band), bare(token_row)
        if not (band.is_inference() or row.is_inference()):  # those have no version
            self._known[band] = weakref.ref(row), _stamp(band, row, sizes)


def _stamp(band: Tensor, row: Tensor, sizes: tuple[int, ...]) -> tuple:
    return band._version, band.data_ptr(), row._version, row.data_ptr(), sizes


_checked = Checked()


def check_map_values(token_band: Tensor, token_row: Tensor, sizes: tuple[int, ...]) -> None:
    if (token_band, token_row, sizes) in _checked:
        return
    band, row = token_band.long(), token_row.long()
    bad = first((band < 0) | (band >= len(sizes)), band)
    if bad is not None:
        ((token,), (number,)) = bad
        raise ValueError(
            f"token_band must lie in [0, {len(sizes)}), the number of tables, got {number} for token {token}"
        )
    bad = first((row < 0) | (row >= torch.tensor(sizes)[band]), band, row)
    if bad is not None:
        ((token,), (number, place)) = bad
        raise ValueError(
            f"token_row must lie in [0, {sizes[number]}), the rows of the token's table {number}, got {place} for "
            f"token {token}"
        )
    _checked.add(token_band, token_row, sizes)


def ids_of(ids: object, vocabulary: int, device: torch.device) -> Tensor:
    """int32 or int64 ids of any shape; on the CPU each one in [0, V)."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids must be an int32 or int64 tensor, got {describe(ids)}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids must be int32 or int64, got {describe(ids)}")
    dense("ids", ids)
    if ids.device != device:
        raise ValueError(f"ids must be on the tables' device {device}, got {ids.device}")
    # Reads values: free on the CPU; elsewhere the lookup itself asserts, as nn.Embedding's does.
    if ids.device.type == "cpu" and has_values(ids) and bare(ids).numel():
        low, high = (int(x) for x in bare(ids).aminmax())
        bad = first((ids < 0) | (ids >= vocabulary), ids) if low < 0 or high >= vocabulary else None
        if bad is not None:
            place, (token,) = bad
            raise IndexError(
                f"ids must lie in [0, {vocabulary}), the vocabulary, got {token} at position {place} of ids of shape "
                f"{list(ids.shape)}"
            )
    return ids


def padding_of(padding_idx: object, vocabulary: int) -> int:
    """A token id, −1 for none; a negative one counts from the end, as in nn.Embedding."""
    if padding_idx is None:
        return -1
    padding_idx = integer("padding_idx", padding_idx)
    if not -vocabulary <= padding_idx < vocabulary:
        raise ValueError(
            f"padding_idx must lie in [{-vocabulary}, {vocabulary}), the vocabulary, or be None, got {padding_idx}"
        )
    return padding_idx % vocabulary


def embedding_arguments(
    ids: object,
    tables: Sequence[Tensor],
    projections: Sequence[Tensor | None],
    token_band: object,
    token_row: object,
    padding_idx: object,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor, Tensor, int]:
    """All of them, checked, in the order of the op's schema."""
    tables = tables_of(tables)
    projections, _ = projections_of(projections, tables)
    token_band, token_row = token_maps(token_band, token_row, tables)
    vocabulary = token_band.shape[0]
    ids = ids_of(ids, vocabulary, tables[0].device)
    return ids, tables, projections, token_band, token_row, padding_of(padding_idx, vocabulary)
