"""`variable_width_embedding`, forward: rows of several widths looked up, projected and written in one launch.

Floor: the output, N·D elements written once, and each row read once from the second-level cache; at N = 16,384,
D = 512 in bf16 that is 16 MiB, or 6 µs at 3 TB/s. Projecting every position of bands 128 and 32 wide takes
N·D·160 multiply-adds, 3 µs of the tensor cores, while a sort of 16k ids to project each distinct row once takes ten
times as long: so nothing is grouped. A program takes a tile of positions and a tile of columns, and for each band that
some of its positions lie in, it gathers their rows, multiplies and stores those rows of the tile. Only where the
products themselves would take longer than a sort (wide projections) are the positions sorted by row first: tiles
then lie in one band and skip the others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lib.common import near_rows
from .lib.dot import dot
from .lib.tuning import distinct, run_tuned, size_class

BANDS_PER_LAUNCH = 4
# Multiply-adds, over all positions and bands, from which sorting the positions by row is the smaller cost.
SORT_FROM = 1 << 34


@triton.jit
def tokens_of(
    ids,  # [N]
    token_band,  # int32 [V]
    token_row,  # [V]
    position,  # [BLOCK]
    inside,  # bool [BLOCK]: position < N
    vocabulary,
    padding_idx,
):
    """(is the id in range, its band or −1, its row) of each position; an id out of range is read nowhere."""
    token = tl.load(ids + position, mask=inside, other=0).to(tl.int64)
    in_range = (token >= 0) & (token < vocabulary)
    named = inside & in_range & (token != padding_idx)
    band = tl.load(token_band + token, mask=named, other=-1)
    row = tl.load(token_row + token, mask=named, other=0).to(tl.int64)
    return in_range, band, row


@triton.jit
def _write_band(
    out,  # [N, D]
    position,  # int64 [BLOCK_N]
    columns,  # [BLOCK_D]
    in_band,  # bool [BLOCK_N]
    row,  # int64 [BLOCK_N]
    table,  # [rows, width]
    projection,  # [D, width]
    rows,
    width,
    table_row,
    table_column,
    projection_row,
    projection_column,
    dim,
    PROJECTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Writes the rows of the tile that lie in the band, and no other."""
    if tl.max(in_band.to(tl.int32), axis=0) > 0:
        exists = (row >= 0) & (row < rows)
        tl.device_assert(exists | ~in_band, "token_row names no row of its band's table")
        readable = in_band & exists
        start = table + row * table_row
        target = out + position[:, None] * dim + columns[None, :]
        stored = in_band[:, None] & (columns < dim)[None, :]
        if PROJECTED:
            k = tl.arange(0, BLOCK_K)
            total = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
            for first in range(0, width, BLOCK_K):
                live = first + k < width
                found = tl.load(
                    start[:, None] + ((first + k) * table_column)[None, :],
                    mask=readable[:, None] & live[None, :],
                    other=0.0,
                )
                factors = tl.load(
                    projection
                    + columns.to(tl.int64)[:, None] * projection_row
                    + ((first + k) * projection_column)[None, :],
                    mask=(columns < dim)[:, None] & live[None, :],
                    other=0.0,
                )
                total = dot(found, tl.trans(factors), total)
            tl.store(target, total.to(out.dtype.element_ty), mask=stored)
        else:
            found = tl.load(
                start[:, None] + (columns * table_column)[None, :],
                mask=readable[:, None] & (columns < width)[None, :],
                other=0.0,
            )
            tl.store(target, found, mask=stored)


# debug=True compiles the assertions in: an id out of range must not pass in silence, as in nn.Embedding.
@triton.jit(
    debug=True,
    do_not_specialize=[
        "count",
        "vocabulary",
        "padding_idx",
        "first_band",
        "rows0",
        "rows1",
        "rows2",
        "rows3",
    ],
)
def embedding_kernel(
    out,  # [N, D]
    ids,  # int [N]
    order,  # int64 [N]: positions sorted by row, if SORTED
    token_band,  # int32 [V]
    token_row,  # int [V]
    table0,  # [rows0, width0], of band first_band
    table1,
    table2,
    table3,
    projection0,  # [D, width0]
    projection1,
    projection2,
    projection3,
    count,  # N
    dim,  # D
    vocabulary,  # V
    padding_idx,
    first_band,
    rows0,
    rows1,
    rows2,
    rows3,
    width0,
    width1,
    width2,
    width3,
    table_row0,  # strides
    table_row1,
    table_row2,
    table_row3,
    table_column0,
    table_column1,
    table_column2,
    table_column3,
    projection_row0,
    projection_row1,
    projection_row2,
    projection_row3,
    projection_column0,
    projection_column1,
    projection_column2,
    projection_column3,
    BANDS: tl.constexpr,  # of this launch
    PROJECTED: tl.constexpr,  # bit b: band b has a projection
    ZEROS: tl.constexpr,  # this launch writes the rows that no band has
    SORTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K0: tl.constexpr,
    BLOCK_K1: tl.constexpr,
    BLOCK_K2: tl.constexpr,
    BLOCK_K3: tl.constexpr,
):
    column_tiles = tl.cdiv(dim, BLOCK_D)
    program = tl.program_id(0)
    place = (program // column_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = (program % column_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = place < count
    position = place
    if SORTED:
        position = tl.load(order + place, mask=inside, other=0)
    in_range, band, row = tokens_of(ids, token_band, token_row, position, inside, vocabulary, padding_idx)
    tl.device_assert(in_range | ~inside, "an id is outside of the vocabulary")
    if ZEROS:
        nothing = inside & (band < 0)
        if tl.max(nothing.to(tl.int32), axis=0) > 0:
            tl.store(
                out + position[:, None] * dim + columns[None, :],
                tl.zeros((BLOCK_N, BLOCK_D), dtype=out.dtype.element_ty),
                mask=nothing[:, None] & (columns < dim)[None, :],
            )
    _write_band(
        out, position, columns, band == first_band, row, table0, projection0, rows0, width0, table_row0,
        table_column0, projection_row0, projection_column0, dim, PROJECTED & 1, BLOCK_N, BLOCK_D, BLOCK_K0,
    )  # fmt: skip
    if BANDS > 1:
        _write_band(
            out, position, columns, band == first_band + 1, row, table1, projection1, rows1, width1, table_row1,
            table_column1, projection_row1, projection_column1, dim, PROJECTED & 2, BLOCK_N, BLOCK_D, BLOCK_K1,
        )  # fmt: skip
    if BANDS > 2:
        _write_band(
            out, position, columns, band == first_band + 2, row, table2, projection2, rows2, width2, table_row2,
            table_column2, projection_row2, projection_column2, dim, PROJECTED & 4, BLOCK_N, BLOCK_D, BLOCK_K2,
        )  # fmt: skip
    if BANDS > 3:
        _write_band(
            out, position, columns, band == first_band + 3, row, table3, projection3, rows3, width3, table_row3,
            table_column3, projection_row3, projection_column3, dim, PROJECTED & 8, BLOCK_N, BLOCK_D, BLOCK_K3,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count", "vocabulary", "padding_idx", "bands", "stride"])
def row_keys_kernel(
    keys,  # int [N]
    ids,  # int [N]
    token_band,  # int32 [V]
    token_row,  # int [V]
    count,
    vocabulary,
    padding_idx,
    bands,
    stride,  # of a band among the keys: the rows of the largest table
    BLOCK: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = position < count
    in_range, band, row = tokens_of(ids, token_band, token_row, position, inside, vocabulary, padding_idx)
    named = (band >= 0) & (band < bands) & (row >= 0) & (row < stride)
    key = tl.where(named, band.to(tl.int64) * stride + row, bands.to(tl.int64) * stride)
    tl.store(keys + position, key.to(keys.dtype.element_ty), mask=inside)


def row_keys(
    flat: Tensor,  # int [N]
    tables: list[Tensor],
    token_band: Tensor,  # int32 [V]
    token_row: Tensor,  # int [V]
    padding_idx: int,
) -> tuple[Tensor, int]:
    """(band · stride + row of each position, int [N]; stride). Positions without a row have the largest key."""
    stride = max(1, *(t.shape[0] for t in tables)) if len(tables) > 1 else max(1, tables[0].shape[0])
    dtype = torch.int32 if stride * (len(tables) + 1) < 2**31 else torch.int64
    keys = torch.empty(flat.shape, dtype=dtype, device=flat.device)
    row_keys_kernel[(triton.cdiv(flat.shape[0], 512),)](
        keys,
        flat,
        token_band,
        token_row,
        flat.shape[0],
        token_band.shape[0],
        padding_idx,
        len(tables),
        stride,
        BLOCK=512,
        num_warps=4,
    )
    return keys, stride


def forward_configs(dtype: torch.dtype, count: int, dim: int, widest: int) -> list[tuple[int, int, int, int]]:
    """(BLOCK_N, BLOCK_D, the largest BLOCK_K, num_warps); `widest` is the largest projected width, 0 for none.

    The others: smaller tiles with more programs, larger ones that read a row's projection fewer times.
    """
    narrow_dim = max(16, triton.next_power_of_2(dim))
    if dtype == torch.float32 and widest:
        some = [(16 if count <= 16 else 32, 64, 16, 4), (16, 64, 16, 2), (64, 64, 16, 8)]
    elif count <= 256:  # a batch of decoded tokens: more programs rather than larger ones
        some = [(16, 64, 64, 2), (16, 32, 64, 1), (16, 128, 64, 4)]
    elif widest > 256:
        some = [(128, 128, 64, 8), (64, 128, 64, 4), (128, 256, 64, 8)]
    else:
        some = [(64, 128, 64, 4), (32, 128, 64, 4), (128, 128, 64, 8), (64, 256, 64, 8)]
    return distinct([(n, min(d, narrow_dim), k, warps) for n, d, k, warps in some])


def variable_width_embedding(
    ids: Tensor,  # int [*]
    tables: list[Tensor],  # B of [n, width]
    projections: list[Tensor],  # B of [D, width], or [0, 0] for none
    token_band: Tensor,  # int32 [V]
    token_row: Tensor,  # int [V]
    padding_idx: int,  # −1 for none
    sparse: bool,
) -> Tensor:  # [*, D]
    dim = projections[0].shape[0] or tables[0].shape[1]
    out = tables[0].new_empty((*ids.shape, dim))
    flat = ids.reshape(-1).contiguous()
    count = flat.shape[0]
    if count == 0:
        return out
    token_band, token_row = token_band.contiguous(), token_row.contiguous()
    tables, projections = [near_rows(t) for t in tables], [near_rows(p) for p in projections]
    projected = [t.shape[1] for t, p in zip(tables, projections, strict=True) if p.numel()]
    order = flat
    is_sorted = len(tables) > 1 and count * dim * sum(projected) >= SORT_FROM
    if is_sorted:
        keys, _ = row_keys(flat, tables, token_band, token_row, padding_idx)
        order = torch.sort(keys, stable=True).indices

    def launch(config: tuple[int, int, int, int]) -> None:
        block_n, block_d, most_k, num_warps = config
        grid = (triton.cdiv(count, block_n) * triton.cdiv(dim, block_d),)
        for first in range(0, len(tables), BANDS_PER_LAUNCH):
            bands = list(zip(tables, projections, strict=True))[first : first + BANDS_PER_LAUNCH]
            some = bands + bands[:1] * (BANDS_PER_LAUNCH - len(bands))  # the kernel does not look at the rest
            embedding_kernel[grid](
                out,
                flat,
                order,
                token_band,
                token_row,
                *(t for t, _ in some),
                *(p for _, p in some),
                count,
                dim,
                token_band.shape[0],
                padding_idx,
                first,
                *(t.shape[0] for t, _ in some),
                *(t.shape[1] for t, _ in some),
                *(t.stride(0) for t, _ in some),
                *(t.stride(1) for t, _ in some),
                *(p.stride(0) for _, p in some),
                *(p.stride(1) for _, p in some),
                BANDS=len(bands),
                PROJECTED=sum(1 << b for b, (_, p) in enumerate(bands) if p.numel()),
                ZEROS=first == 0,
                SORTED=is_sorted,
                BLOCK_N=block_n,
                BLOCK_D=block_d,
                **{
                    f"BLOCK_K{b}": min(most_k, max(16, triton.next_power_of_2(t.shape[1])))
                    for b, (t, _) in enumerate(some)
                },
                num_warps=num_warps,
                num_stages=2,
                # Offsets are int64 where they can be large; checks of each addition would only slow the kernel down.
                sanitize_overflow=False,
            )

    run_tuned(
        "variable_width_embedding",
        (out.dtype, dim, *(t.shape[1] for t in tables), size_class(count)),
        forward_configs(out.dtype, count, dim, max(projected, default=0)),
        launch,
        out.device,
    )
    return out
