"""Which of the best keys a selection finds, and how much attention is on those that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_attn.evaluation.arms import Arm
from sparse_attn.integrations.indexers import ATTRIBUTE, attention_layers
from sparse_attn.integrations.options import DEFAULTS
from sparse_attn.integrations.selectors import selector_of
from sparse_attn.integrations.visibility import scores_of
from sparse_attn.integrations.watching import Given, watching
from sparse_attn.rule import Rule
from sparse_attn.selection import Exact, FromIndexer, Selection, Selector, attend
from sparse_attn.wings.reference.rule import VisibleKeys, capped
from sparse_attn.wings.reference.topk_select import products

QUERIES = 256  # the last of a document, whose selections are looked at
REUSED = "exact, of the layer before"


class Found(NamedTuple):
    """Means over the layers of one selection at one budget."""

    arm: str
    keys: int
    recall: float  # of each head's own best keys
    mass: float  # of the dense attention
    least_mass: float  # of any layer


def recalls(model: torch.nn.Module, tokens: Tensor, arms: Sequence[tuple[Arm, int]]) -> list[Found]:
    """What (arm, keys) find in the dense model's own queries and keys over tokens [T]: one forward serves them all.

    At each budget also what the exact selection of the layer before holds here (REUSED): the price of making one
    selection for two layers.
    """
    budgets = sorted({keys for _, keys in arms})
    sums: dict[tuple[str, int], list[tuple[float, float]]] = {}
    before: dict[int, Selection] = {}
    reused: dict[tuple[str, int], Selection] = {}  # of the layer that chose last
    layers: list[int] = []  # that were looked at

    @torch.no_grad()
    def look(given: Given) -> None:
        rows = slice(max(0, given.query.shape[2] - QUERIES), given.query.shape[2])
        query = given.query[:, :, rows].contiguous()
        last, seen = given.seen.of_rows(rows, query.shape[0])
        key, value = given.key[:, :, :last], given.value[:, :, :last]
        scoring = scores_of(given.scale, given.others["softcap"], given.others["s_aux"])
        plain = {name: value for name, value in scoring.items() if name != "sink_logits"}
        rule = Rule(**seen, **plain)  # of the keys alone: what a sink takes is nobody's to find

        def held(chosen: Selection) -> Tensor:
            return attend(query, key, value, chosen, rule=rule, return_lse=True)[1]

        best = {keys: Exact().select(query, key, keys, rule) for keys in budgets}
        found = {(REUSED, keys): chosen for keys, chosen in before.items()}
        for arm, keys in arms:
            if len(layers) % arm.reuse:
                found[arm.text, keys] = reused[arm.text, keys]
                continue
            selector, kept = _selector(arm, keys, given, rows)
            own = Rule(**seen, **kept, **scoring, share=arm.share)
            found[arm.text, keys] = reused[arm.text, keys] = selector.select(query, key, keys, own)
        layers.append(given.module.layer_idx)
        packed = rule.packed(query, key)
        visible = VisibleKeys(key, packed).of(slice(0, query.shape[2]))[0]
        scores = capped(products(query.float(), key.float()) * packed.scale, packed.softcap)
        every = scores.masked_fill_(~visible, -torch.inf).logsumexp(-1)
        for name, chosen in found.items():
            share = found_share(chosen, best[name[1]].indices, last)
            sums.setdefault(name, []).append((share, float((held(chosen) - every).exp().mean())))
        before.update(best)

    with watching(model, look, attention_layers(model).values()) as run:
        run(tokens[None])
    result = []
    for (name, keys), each in sums.items():
        recall, mass = (sum(x) / len(each) for x in zip(*each, strict=True))
        result.append(Found(name, keys, recall, mass, min(m for _, m in each)))
    return result


def found_share(chosen: Selection, exact: Tensor, length: int) -> float:
    """How many of `exact` [B, Hq, T, K], each head's own best keys, are among the chosen."""
    size, tile = chosen.block_size or 1, chosen.query_tile
    indices = chosen.indices.long()  # [B, G, N, M]
    count = -(-length // size)
    there = torch.zeros(*indices.shape[:3], count + 1, dtype=torch.bool, device=indices.device)
    there.scatter_(-1, torch.where(indices >= 0, indices, count), True)
    there = there[..., :count].repeat_interleave(tile, 2)[:, :, : exact.shape[2]]
    there = there.repeat_interleave(exact.shape[1] // there.shape[1], 1)
    hit = there.gather(-1, (exact.long() // size).clamp(min=0)) & (exact >= 0)
    return float(hit.sum()) / float((exact >= 0).sum())


def _selector(arm: Arm, keys: int, given: Given, rows: slice) -> tuple[Selector, dict[str, int]]:
    """What chooses keys for some rows of a layer, and what its rule always keeps."""
    options = {**DEFAULTS, **arm.options(keys)}
    kept = {name: options[name] for name in ("window", "sinks")}
    if not isinstance(options["selector"], str):
        return options["selector"], kept
    index = None
    if options["selector"] == "indexer":
        indexer, hidden = getattr(given.module, ATTRIBUTE), given.hidden
        hidden = hidden.to(indexer.key.weight.dtype)
        rope = None if given.rope is None else tuple(t[:, rows] for t in given.rope)
        query, weights = indexer.queries(hidden[:, rows], rope)
        index = FromIndexer(query, indexer.keys(hidden, given.rope), weights)
    return selector_of(given.module, options, index), kept
