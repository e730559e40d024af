"""Cases of plan_widths: what its documentation promises of a plan."""

from __future__ import annotations

import torch

import sparse_attn
from fuzz.case import Case, Draw, Fuzzed, call, fuzzed, generator


@fuzzed
class PlanWidths(Fuzzed):
    name = "plan_widths"
    weight = 1
    wings = ("reference",)
    dtypes = ("int64", "float32", "float64")

    def draw(self, draw: Draw) -> Case:
        case = {
            "V": draw.size(300, 1),
            "D": draw.size(130, 1),
            "counts": draw.choice(("zipf", "equal", "zeros", "one", "random")),
        }
        case |= {"ratio": draw.choice((None, 0.05, 0.25, 0.5, 0.9, 1.0)), "num_bands": draw.randint(1, 6)}
        case |= {"budget": draw.size(20_000, 1) if draw.random() < 0.5 else draw.randint(1, 20_000)}
        return case | {
            "rule": draw.choice(("lagrange", "power", "mass")),
            "multiple_of": draw.choice((1, 4, 8, 8, 16)),
        }

    def counts(self, case: Case) -> torch.Tensor:
        source = generator(case, "counts")
        size = case["V"]
        found = {
            "zipf": 1e5 / (torch.randperm(size, generator=source) + 2.7),
            "equal": torch.full((size,), 3.0),
            "zeros": torch.zeros(size),
            "one": torch.arange(size).eq(size // 2).float(),
            "random": torch.rand(size, generator=source).mul(50).floor(),
        }[case["counts"]]
        return found.to(getattr(torch, case["dtype"]))

    def check(self, case: Case) -> None:
        counts, size, dim = self.counts(case), case["V"], case["D"]
        given = {"budget": case["budget"]} if case["ratio"] is None else {"ratio": case["ratio"]}
        options = {n: case[n] for n in ("num_bands", "rule", "multiple_of")}
        try:
            plan = call(case, sparse_attn.plan_widths, counts, dim, **given, **options)
        except ValueError as error:
            if "budget" not in str(error) and "ratio" not in str(error):
                raise AssertionError(f"refused for something else: {error}") from error
            return
        budget = given.get("budget", int(size * dim * given.get("ratio", 1.0)))
        sizes = torch.bincount(plan.token_band.long(), minlength=len(plan.widths)).tolist()
        spent = sum(n * w + (0 if w == dim else dim * w) for n, w in zip(sizes, plan.widths, strict=True))
        assert spent <= budget, f"the plan has {spent} parameters, the budget is {budget}"
        assert plan.token_band.shape == (size,)
        assert len(plan.widths) <= case["num_bands"]
        assert list(plan.widths) == sorted(plan.widths, reverse=True)
        assert all(w == dim or w % case["multiple_of"] == 0 for w in plan.widths)
        assert all(sizes), "a band without tokens"
        width = torch.tensor(plan.widths)[plan.token_band.long()]
        order = counts.argsort(descending=True, stable=True)
        ordered, widths = counts[order], width[order]
        # Of two tokens the more frequent never has the narrower row.
        wider = widths.flip(0).cummax(0).values.flip(0)[1:] > widths[:-1]
        assert not bool((wider & (ordered[1:] < ordered[:-1])).any()), (
            "a more frequent token has the narrower row"
        )
        if budget >= size * dim:
            assert list(plan.widths) == [dim]
