"""Cases of variable_width_cross_entropy."""

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
from fuzz.embeddings import draw_tables, tables_of


@fuzzed
class VariableWidthCrossEntropy(Fuzzed):
    name = "variable_width_cross_entropy"

    def draw(self, draw: Draw) -> Case:
        case = draw_tables(draw, one_row_each=True) | draw_kinds(draw, "hidden")
        small = draw.choice(([draw.size(20)], [], [draw.size(4), draw.size(5)]))
        case |= {"N": [draw.randint(50, 200)] if draw.large else small}
        case |= {
            "reduction": draw.choice(("mean", "sum", "none")),
            "label_smoothing": draw.choice((0.0, 0.0, 0.1, 1.0)),
        }
        case |= {"z_loss": draw.choice((0.0, 0.0, 1e-2)), "weighted": draw.choice((False, False, True))}
        case |= {"ignore_index": draw.choice((-100, -100, 0, 7)), "ignored": draw.choice((0.0, 0.3, 1.0))}
        case |= {"upstream_values": draw.choice(("normal", "normal", "normal", "nan", "inf"))}
        return case | {"grads": draw.random() < 0.6, "ids_dtype": draw.choice(("int32", "int64"))}

    def check(self, case: Case) -> None:
        e, dtype = tables_of(case), DTYPES[case["dtype"]]
        hidden = numbers(case, "hidden", case["hidden_values"], *case["N"], case["D"]).to(dtype)
        targets = torch.randint(case["V"], case["N"], generator=generator(case, "targets"))
        ignored = torch.rand(case["N"], generator=generator(case, "ignored")) < case["ignored"]
        targets = targets.masked_fill(ignored, case["ignore_index"]).to(getattr(torch, case["ids_dtype"]))
        weight = torch.rand(case["V"], generator=generator(case, "weight")) if case["weighted"] else None
        options = {n: case[n] for n in ("reduction", "label_smoothing", "z_loss", "ignore_index")}
        leaves = [hidden, *e.leaves]
        if case["grads"]:
            leaves = [t.requires_grad_() for t in leaves]
        loss = run(
            case, "variable_width_cross_entropy", hidden, targets, *e.arguments, weight=weight, **options
        )
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        assert loss.shape == (tuple(case["N"]) if case["reduction"] == "none" else ())
        active = targets != case["ignore_index"]
        upstream = numbers(case, "upstream", case["upstream_values"], *loss.shape).to(loss.dtype)
        if case["grads"]:
            found = torch.autograd.grad(loss, leaves, upstream)
            for got, leaf in zip(found, leaves, strict=True):
                assert got.dtype == dtype
                assert got.shape == leaf.shape
        if case["reduction"] == "none":
            assert not bool(loss.detach()[~active].any()), "an ignored target has a loss"
        if among(case, EXTREME + SPECIAL, "tables", "projections", "hidden"):
            return
        ordinary = case["grads"] and case["upstream_values"] == "normal"
        self.compare(
            case, loss.detach(), found if ordinary else None, hidden, targets.long(), e, weight, upstream
        )

    def sizes_of_logits(self, h: Tensor, exact: Tables) -> Tensor:
        """Σ |projected hidden state| · |row|, [N, V]."""
        first = torch.tensor([0, *(len(t) for t in exact.tables[:-1])]).cumsum(0)
        each = [
            (h if p is None else h @ p).abs() @ t.abs().t()
            for t, p in zip(exact.tables, exact.projections, strict=True)
        ]
        return torch.cat(each, dim=1)[:, first[exact.token_band.long()] + exact.token_row.long()]

    def compare(self, case, loss, found, hidden, targets, e, weight, upstream) -> None:
        """The dense head in float64; errors of a logit, and what they come to in the loss and in each gradient."""
        dtype = hidden.dtype
        unit = accumulation(dtype) * (2 if dtype == torch.float64 else 1)
        h = hidden.detach().double().reshape(-1, case["D"])
        targets, upstream = targets.reshape(-1), upstream.detach().double()
        active = targets != case["ignore_index"]
        exact, sizes = e.to(torch.float64), e.sizes().to(torch.float64)
        dense, dense_sizes = exact.dense(), sizes.dense()
        vocabulary, smoothing = case["V"], case["label_smoothing"]
        weight = torch.ones(vocabulary).double() if weight is None else weight.double()
        logits, logit_sizes = h @ dense.t(), h.abs() @ dense_sizes.t()
        rounds = case["D"] + max(case["widths"]) + 6
        error = rounds * unit * logit_sizes
        if (
            dtype == torch.bfloat16
        ):  # projected hidden states may be rounded to it, as PyTorch's own products are
            error = error + 2.0**-8 * self.sizes_of_logits(h, exact)
        error = error.amax(1, keepdim=True)  # [N, 1]
        lse = logits.logsumexp(1, keepdim=True)
        lse_error = error + unit * (vocabulary + 16 + 2 * lse.abs())
        safe = targets.where(active, 0)
        own = weight[safe] * active  # [N]
        picked = logits.gather(1, safe.unsqueeze(1))
        per_class = smoothing / vocabulary
        sharp = ((1 - smoothing) * own).unsqueeze(1)
        value = sharp * (lse - picked) + per_class * (weight.sum() * lse - (logits @ weight).unsqueeze(1))
        value_error = sharp * (lse_error + error) + per_class * weight.sum() * (lse_error + error)
        value_error = value_error + unit * (vocabulary + 8) * (
            value.abs() + per_class * weight.sum() * (logits.abs().amax(1, keepdim=True) + lse.abs())
        )
        value = value + case["z_loss"] * lse.square()
        value_error = value_error + case["z_loss"] * (2 * lse.abs() * lse_error + 4 * unit * lse.square())
        value, value_error = ((t.squeeze(1) * active) for t in (value, value_error))
        count = {"mean": own.sum() if case["weighted"] else active.sum().double(), "sum": 1.0, "none": 1.0}[
            case["reduction"]
        ]
        n = max(1, len(targets))
        if case["reduction"] == "none":
            wanted = value.view(loss.shape), value_error.view(loss.shape)
            each = upstream.reshape(-1, 1)
        else:
            total = value.sum() / count
            wanted = (
                total,
                value_error.sum() / count + (n + 4) * unit * (value.abs().sum() / count + total.abs()),
            )
            each = (upstream / count).expand(n if len(targets) else 0, 1)
        wanted = wanted[0], wanted[1] + torch.finfo(loss.dtype).eps * wanted[0].abs() + 1e-37
        assert_bounded(loss, wanted, "loss")
        if found is None:
            return
        p = (logits - lse).exp()
        grad = sharp * p + per_class * weight.sum() * p + 2 * case["z_loss"] * lse * p
        grad_sizes = grad.abs() + sharp * torch.nn.functional.one_hot(safe, vocabulary) + per_class * weight
        relative = (error + lse_error).clamp(max=50).expm1() + unit * 16
        errors = (sharp + per_class * weight.sum()) * (p * relative + 2.0**-126)
        errors = errors + 2 * case["z_loss"] * p * (lse.abs() * relative + lse_error) + 8 * unit * grad_sizes
        grad = grad - sharp * torch.nn.functional.one_hot(safe, vocabulary) - per_class * weight
        on = active.unsqueeze(1)
        grad, errors, grad_sizes = (torch.where(on, t * each, 0.0) for t in (grad, errors, grad_sizes))
        errors, grad_sizes = errors.abs(), grad_sizes.abs()
        total = errors + (vocabulary + rounds + n + 16) * unit * grad_sizes
        if dtype == torch.bfloat16:  # gradients of logits and of projected hidden states, likewise
            total = total + 3 * 2.0**-8 * grad.abs()
        h = torch.where(on, h, 0.0)
        results = [(grad @ dense, total @ dense_sizes)]
        d_dense, d_error = grad.t() @ h, total.t() @ h.abs()
        tables, projections = [], []
        for b, (table, projection) in enumerate(zip(exact.tables, exact.projections, strict=True)):
            mine = exact.token_band == b
            place = exact.token_row[mine].long()
            g, err = (
                torch.zeros(len(table), case["D"], dtype=torch.float64).index_add_(0, place, t[mine])
                for t in (d_dense, d_error)
            )
            tables.append((g, err) if projection is None else (g @ projection, err @ projection.abs()))
            if projection is not None:
                projections.append((g.t() @ table, err.t() @ table.abs()))
        rounding = torch.finfo(dtype)
        for got, (want, error), name in zip(
            found,
            [*results, *tables, *projections],
            ["hidden", *(["table"] * len(tables)), *(["projection"] * len(projections))],
            strict=True,
        ):
            want, error = want.reshape(got.shape), error.reshape(got.shape)
            bad = not math.isfinite(
                float(torch.as_tensor(count).reciprocal() if case["reduction"] == "mean" else 1.0)
            )
            if bad:  # a mean over nothing: its upstream is inf, and nothing counts
                assert not bool(got.any()), f"gradient of {name}: not 0 where no target counts"
                continue
            assert_bounded(
                got,
                (want, error + rounding.eps * want.abs() + rounding.tiny + UNDERFLOW),
                f"gradient of {name}",
            )
