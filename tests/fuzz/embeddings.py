"""Cases of variable_width_embedding."""

from __future__ import annotations

import math

import torch
from helpers.compare import accumulation
from helpers.embeddings import Tables
from torch import Tensor

from fuzz.bounds import UNDERFLOW, assert_bounded
from fuzz.case import (
    DTYPES,
    EXTREME,
    SPECIAL,
    Case,
    Draw,
    Fuzzed,
    among,
    draw_kinds,
    fuzzed,
    generator,
    numbers,
    run,
)

VIEWS_2D = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.t().contiguous().t(),
    "every_second": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
    "inside": lambda t: torch.nn.functional.pad(t, (3, 2, 1, 1), value=math.nan)[1:-1, 3:-2],
}


def draw_tables(draw: Draw, *, one_row_each: bool) -> Case:
    large = draw.large
    dim = draw.size(200 if large else 40, 30 if large else 1)
    bands = draw.randint(1, 4)
    widths = [draw.choice((dim, draw.size(dim + 3, 1))) for _ in range(bands)]
    sizes = [draw.size(900 if large else 40, 200 if large else 0) for _ in range(bands)]
    if not any(sizes):
        sizes[0] = 1
    case = {
        "D": dim,
        "widths": widths,
        "rows": sizes,
        "project_all": draw.random() < 0.2,
        "wide_rows": draw.random() < 0.3,
    }
    case |= {"table_view": draw.choice([*VIEWS_2D, *["contiguous"] * 3]), "one_row_each": one_row_each}
    case |= {"V": sum(sizes) if one_row_each else draw.size(60, 1)}
    kinds = draw_kinds(draw, "tables", "projections")
    return case | {name: kind for name, kind in kinds.items() if name.endswith("_values")}


def tables_of(case: Case) -> Tables:
    dim, dtype, view = case["D"], DTYPES[case["dtype"]], VIEWS_2D[case["table_view"]]
    tables, projections = [], []
    for b, (width, size) in enumerate(zip(case["widths"], case["rows"], strict=True)):
        table = numbers(case, f"tables {b}", case["tables_values"], size, width)
        tables.append(view(table.to(dtype)))
        projection = numbers(case, f"projections {b}", case["projections_values"], dim, width)
        none = width == dim and not case["project_all"]
        projections.append(None if none else view(projection.to(dtype)))
    band = torch.repeat_interleave(torch.arange(len(tables)), torch.tensor(case["rows"]))
    row = torch.cat([torch.arange(n) for n in case["rows"]])
    source = generator(case, "maps")
    if case["one_row_each"]:
        order = torch.randperm(len(band), generator=source)
    else:  # tokens may share a row
        order = torch.randint(len(band), (case["V"],), generator=source)
    row = row[order] if case["wide_rows"] else row[order].int()
    return Tables(tables, projections, band[order].int(), row)


def sums(exact: Tensor, terms: Tensor, roundings: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A sum of `terms`, absolute values, each rounded so often; then once to the dtype."""
    unit = accumulation(dtype) * (2 if dtype == torch.float64 else 1)
    return exact, roundings * unit * terms + torch.finfo(dtype).eps * exact.abs().nan_to_num(
        0, 0, 0
    ) + torch.finfo(dtype).tiny + UNDERFLOW


@fuzzed
class VariableWidthEmbedding(Fuzzed):
    name = "variable_width_embedding"

    def draw(self, draw: Draw) -> Case:
        case = draw_tables(draw, one_row_each=False)
        shape = (
            [draw.randint(200, 3000)]
            if draw.large
            else draw.choice(
                (
                    [draw.size(64)],
                    [],
                    [draw.size(5), draw.size(9)],
                    [2, 0, 3],
                    [1, draw.size(3), draw.size(8)],
                )
            )
        )
        case |= {
            "ids": shape,
            "ids_dtype": draw.choice(("int32", "int64")),
            "ids_strided": draw.random() < 0.3,
        }
        case |= {"padding_idx": draw.maybe(0.4, lambda: draw.randint(-case["V"], case["V"] - 1))}
        case |= {"grad_values": draw.choice(("normal", "normal", "normal", "nan", "inf"))}
        return case | {"grads": draw.random() < 0.5, "sparse": draw.random() < 0.4}

    def check(self, case: Case) -> None:
        e = tables_of(case)
        dtype = DTYPES[case["dtype"]]
        ids = torch.randint(case["V"], (*case["ids"], 2), generator=generator(case, "ids"))
        ids = ids.to(getattr(torch, case["ids_dtype"]))[..., 0]
        ids = ids if case["ids_strided"] else ids.contiguous()
        if case["grads"]:
            e.require_grad()
        padding = case["padding_idx"]
        options = {"padding_idx": padding, "sparse": case["sparse"]}
        out = run(case, "variable_width_embedding", ids, *e.arguments, **options)
        assert out.dtype == dtype
        assert out.shape == (*ids.shape, case["D"])
        if case["grads"]:
            grad_out = numbers(case, "grad", case["grad_values"], *out.shape).to(dtype)
            found = torch.autograd.grad(out, e.leaves, grad_out)
        if among(case, EXTREME, "tables", "projections"):
            return
        special = among(case, SPECIAL, "tables", "projections")
        exact, terms = e.to(torch.float64), e.sizes().to(torch.float64)
        rounds = 2 * max(case["widths"]) + case["D"] + ids.numel() + 8
        hidden = ids.long() == (padding % case["V"] if padding is not None else -1)

        def looked_up(t: Tables) -> Tensor:
            return torch.where(
                hidden.unsqueeze(-1), 0.0, torch.nn.functional.embedding(ids.long(), t.dense())
            )

        with torch.no_grad():
            assert_bounded(
                out.detach(),
                sums(looked_up(exact), looked_up(terms).nan_to_num(0, 0, 0), rounds, dtype),
                "out",
            )
        if not case["grads"]:
            return
        for number, (got, leaf) in enumerate(zip(found, e.leaves, strict=True)):
            assert got.layout == (
                torch.sparse_coo if case["sparse"] and number < len(e.tables) else torch.strided
            )
            assert got.dtype == dtype
            assert got.shape == leaf.shape
        if special or case["grad_values"] != "normal":
            return
        for t in (exact, terms):
            t.require_grad()
        wanted = torch.autograd.grad(looked_up(exact), exact.leaves, grad_out.double(), allow_unused=True)
        sizes = torch.autograd.grad(
            looked_up(terms), terms.leaves, grad_out.double().abs(), allow_unused=True
        )
        for number, (got, want, size, leaf) in enumerate(zip(found, wanted, sizes, e.leaves, strict=True)):
            if got.is_sparse:
                assert got.is_coalesced()
                assert bool((got.indices()[0].diff() > 0).all()), (
                    "rows of a sparse gradient are not ascending"
                )
                got = got.to_dense()
            want, size = (
                torch.zeros_like(leaf, dtype=torch.float64) if t is None else t for t in (want, size)
            )
            assert_bounded(got, sums(want, size, rounds, dtype), f"gradient {number}")
