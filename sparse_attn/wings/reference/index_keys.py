"""Definition of `index_keys`: rows of a key index from keys, written in place."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.wings.reference.wing import implements

BLOCK = 16  # keys whose components lie side by side
AT_ONCE = 1 << 20  # elements of keys


@implements
def index_keys(
    key: Tensor,  # [B, Hkv, T, D]
    codes: Tensor,  # int8 [B, Hkv, N, ⌈D/4⌉, 16, 4]
    bounds: Tensor,  # float32 [B, Hkv, N, 3, 16]
    shift: Tensor,  # float32 [B, Hkv, D]
    begin: int,  # place of the first key
) -> None:
    end = begin + key.shape[2]
    step = max(BLOCK, AT_ONCE // max(1, key.shape[0] * key.shape[1] * key.shape[3]) // BLOCK * BLOCK)
    at = begin
    while at < end:
        stop = min(end, (at + step) // BLOCK * BLOCK)  # up to a block's end, then whole blocks
        _write(codes, bounds, at, *_rounded(key[:, :, at - begin : stop - begin], shift))
        at = stop


@implements
def index_pages(
    key: Tensor,  # [T, Hkv, D]
    slots: Tensor,  # int64 [T]: page · page size + place; below 0: nowhere
    codes: Tensor,  # int8 [P, Hkv, n, ⌈D/4⌉, 16, 4]
    bounds: Tensor,  # float32 [P, Hkv, n, 3, 16]
    shift: Tensor,  # float32 [Hkv, D]
) -> None:
    key, slots = key[slots >= 0], slots[slots >= 0]
    # Of several keys with one slot the last one stays.
    places = {slot: n for n, slot in enumerate(slots.tolist())}
    which = torch.tensor(list(places.values()), dtype=torch.int64, device=key.device)
    numbers, three = _rounded(key[which].transpose(0, 1)[None], shift[None])  # [1, Hkv, T, …]
    block, lane = slots[which] // BLOCK, slots[which] % BLOCK
    page, block = block // codes.shape[2], block % codes.shape[2]
    codes[page, :, block, :, lane] = numbers[0].transpose(0, 1)
    bounds[page, :, block, :, lane] = three[0].transpose(0, 1)


def rows_of(
    codes: Tensor,  # int8 [B, Hkv, N, ⌈D/4⌉, 16, 4]
    bounds: Tensor,  # float32 [B, Hkv, N, 3, 16]
    length: int,
    dim: int,
) -> tuple[Tensor, Tensor]:  # int8 [B, Hkv, T, D], float32 [B, Hkv, T, 3]
    """Codes and bounds of the first `length` keys, one after the other."""
    rows = codes.permute(0, 1, 2, 4, 3, 5).flatten(4)[..., :dim]  # [B, Hkv, N, 16, D]
    return rows.flatten(2, 3)[:, :, :length], bounds.transpose(3, 4).flatten(2, 3)[:, :, :length]


def _write(to_codes: Tensor, to_bounds: Tensor, begin: int, codes: Tensor, bounds: Tensor) -> None:
    """codes [B, Hkv, t, ⌈D/4⌉, 4] and bounds [B, Hkv, t, 3] to the keys from `begin` on."""
    first, lane, count = begin // BLOCK, begin % BLOCK, codes.shape[2]
    if lane or count < BLOCK:  # within one block
        part = min(count, BLOCK - lane)
        to_codes[:, :, first, :, lane : lane + part] = codes[:, :, :part].transpose(2, 3)
        to_bounds[:, :, first, :, lane : lane + part] = bounds[:, :, :part].transpose(2, 3)
        if part < count:
            _write(to_codes, to_bounds, begin + part, codes[:, :, part:], bounds[:, :, part:])
        return
    whole = count // BLOCK
    for to, rows in ((to_codes, codes), (to_bounds, bounds)):
        blocks = rows[:, :, : whole * BLOCK].unflatten(2, (whole, BLOCK)).transpose(3, 4)
        if to is to_codes:  # words of four, which copy faster than bytes
            blocks, to = blocks.view(torch.int32), to.view(torch.int32)
        to[:, :, first : first + whole] = blocks
    if count % BLOCK:
        _write(
            to_codes,
            to_bounds,
            begin + whole * BLOCK,
            codes[:, :, whole * BLOCK :],
            bounds[:, :, whole * BLOCK :],
        )


def _rounded(key: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """keys [B, Hkv, t, D] → (whole numbers int8 [B, Hkv, t, ⌈D/4⌉, 4], float32 [B, Hkv, t, 3]: their scale, and no
    less than the norms of what rounding changed and of the shifted key)."""
    dim, compute = key.shape[3], torch.promote_types(key.dtype, torch.float32)
    rows = key.to(compute) - shift.to(compute).unsqueeze(2)
    largest, norm = rows.abs().amax(-1), rows.norm(dim=-1)
    # Products with larger keys could leave float32; the infinite norm lets them pass every bound.
    useful = norm < 1e18
    if not bool(useful.all()):
        rows = torch.where(useful.unsqueeze(-1), rows, 0.0)
        largest = torch.where(useful, largest, 0.0)
    scale = (largest / 127.0).float()
    step = scale.to(compute).unsqueeze(-1)
    # A scale of 0 has rows of next to nothing, which take no part in a product.
    numbers = torch.where(step > 0, rows / step, 0.0).round_().clamp_(-127.0, 127.0)
    error = rows.sub_(numbers * step).norm(dim=-1)
    # What the arithmetic above can have lost: of each component a few units, of each sum of squares D of them, and
    # all of it where squares vanish.
    unit = torch.finfo(compute).eps
    error = error + 4 * unit * norm
    tiny = largest < 1e-10
    more = 1 + 2 * dim * unit + 1e-6
    bounds = torch.stack(
        (
            scale.to(compute),
            torch.where(tiny, largest * dim**0.5, error) * more,
            torch.where(useful, torch.where(tiny, largest * dim**0.5, norm) * more, torch.inf),
        ),
        dim=-1,
    )
    numbers = torch.nn.functional.pad(numbers, (0, -dim % 4)).to(torch.int8).contiguous()
    return numbers.unflatten(-1, (-1, 4)), bounds.float()
