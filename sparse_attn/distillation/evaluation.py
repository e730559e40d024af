"""How well a choice of keys, or a whole student, agrees with its teacher on text that neither was trained on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_attn import checks
from sparse_attn.distillation.baselines import Chooser
from sparse_attn.distillation.hybrid import pairs
from sparse_attn.distillation.progress import Progress, length_of, reporting
from sparse_attn.distillation.teacher import Heads, attention_layers, evaluating, logits_of, observe
from sparse_attn.nn import TopKAttention
from sparse_attn.ops.gathered_attention import gathered_attention


class _Error:
    """A relative error, √(Σ ‖a − b‖² / Σ ‖b‖²), added up over batches; one per head where there are heads."""

    def __init__(self) -> None:
        self.wrong = self.size = 0.0

    def add(self, actual: Tensor, wanted: Tensor, dims: tuple[int, ...] = (0, 1, 2)) -> None:
        self.wrong = self.wrong + (actual - wanted).double().square().sum(dims)
        self.size = self.size + wanted.double().square().sum(dims)

    def value(self) -> float | list[float]:
        return (self.wrong / self.size).sqrt().tolist()


@torch.no_grad()
def selection_quality(
    teacher: torch.nn.Module,
    choosers: Mapping[str, Chooser],
    stream: Iterable[Tensor],
    *,
    budgets: Sequence[int] = (8, 16, 32),
    progress: Progress | bool | None = None,
) -> dict[str, dict]:
    """What choices of keys hold of the teacher's attention, each with exact attention to the chosen keys.

    Args:
        teacher: a model with TopKAttention layers.
        choosers: functions (layer's name, its Heads, top_k) → indices, by name; see `distillation.baselines`.
        stream: batches of token ids, int64 [B, T], T larger than every budget.
        budgets: keys per query.
        progress: True for a progress bar, or a function called with (name, done, total or None, note).

    Returns:
        For each chooser a dict of means over layers, with the same for each layer under "layers":
        "top1", how often its single best key is the teacher's; "recall", by budget, the share of the attention mass
        on the chosen keys; "layer_error", by budget, the relative error of the layer's output. top1 and recall
        count only the queries that see more keys than they may choose; layer_error counts all.

    Raises:
        ValueError: a budget that is no smaller than T, or a stream without batches.
    """
    budgets = [checks.integer("each of budgets", k, 1) for k in budgets]
    layers = attention_layers(teacher)
    counts = {(c, name): _Choice(budgets) for c in choosers for name in layers}
    with reporting("evaluate keys", length_of(stream), progress) as advance:
        for ids in stream:
            if ids.shape[1] <= max(budgets):
                raise ValueError(f"budgets must be smaller than T = {ids.shape[1]}, got {max(budgets)}")
            for name, heads in observe(teacher, ids).layers.items():
                lse, best = _full_rows(heads)
                for chooser, choose in choosers.items():
                    counts[chooser, name].add(layers[name], heads, lse, best, partial(choose, name, heads))
            advance()
    if any(not count.queries for count in counts.values()):
        raise ValueError("stream must have at least one batch, got none")
    results = {}
    for chooser in choosers:
        each = {name: counts[chooser, name].result() for name in layers}
        results[chooser] = _mean(list(each.values())) | {"layers": each}
    return results


class _Choice:
    """Sums of one chooser on one layer."""

    def __init__(self, budgets: list[int]) -> None:
        self.budgets, self.queries, self.hits = budgets, 0, 0.0
        self.mass = dict.fromkeys(budgets, 0.0)
        self.rows = dict.fromkeys(budgets, 0)
        self.errors = {k: _Error() for k in budgets}

    def add(self, layer: TopKAttention, heads: Heads, lse: Tensor, best: Tensor, choose) -> None:
        """lse float32 and best int64 [B, H, T] of the teacher's rows; choose(top_k) → indices [B, G, T, K]."""
        self.queries += best[:, :, 1:].numel()
        self.hits += (choose(1)[..., 0] == best)[:, :, 1:].sum().item()
        for k in self.budgets:
            out, chosen_lse = gathered_attention(
                heads.query, heads.key, heads.value, choose(k), return_lse=True
            )
            mass = (chosen_lse - lse).exp()[:, :, k:]  # query i sees i + 1 keys
            self.mass[k] += mass.double().sum().item()
            self.rows[k] += mass.numel()
            self.errors[k].add(layer.out(out.transpose(1, 2).flatten(2)), heads.result)

    def result(self) -> dict:
        return {
            "top1": self.hits / self.queries,
            "recall": {k: self.mass[k] / self.rows[k] for k in self.budgets},
            "layer_error": {k: self.errors[k].value() for k in self.budgets},
        }


def _full_rows(heads: Heads) -> tuple[Tensor, Tensor]:
    """LSE and best key of the teacher's whole rows, float32 and int64 [B, H, T]."""
    found = [(scores.logsumexp(-1), scores.argmax(-1)) for scores in map(heads.scores, heads.blocks())]
    lse, best = zip(*found, strict=True)
    return torch.cat(lse, dim=2), torch.cat(best, dim=2)


def _mean(results: list[dict]) -> dict:
    """The mean of equal dicts of numbers, entry by entry."""
    first = results[0]
    return {
        key: _mean([r[key] for r in results])
        if isinstance(first[key], dict)
        else math.fsum(r[key] for r in results) / len(results)
        for key in first
    }


@torch.no_grad()
def evaluate(
    teacher: torch.nn.Module,
    student: torch.nn.Module,
    stream: Iterable[Tensor],
    *,
    progress: Progress | bool | None = None,
) -> dict:
    """How far a student is from its teacher: per head, per layer, and in what it predicts.

    The errors of heads and layers are made with the teacher's own input to that layer, so that each layer answers for
    itself; those of the logits with the student run as a whole, so that errors add up.

    Args:
        teacher: a model with TopKAttention layers.
        student: a model with layers of the same names (`hybridize`, or a copy with another top_k).
        stream: batches of token ids, int64 [B, T].
        progress: True for a progress bar, or a function called with (name, done, total or None, note).

    Returns:
        "layers": for each layer "head_error" (a list, one per head) and "layer_error"; "head_error" and
        "layer_error", their means; "logits_error"; "teacher_loss" and "student_loss", cross-entropy of the next
        token in nats; "tokens", how many were predicted. Errors are √(Σ ‖student − teacher‖² / Σ ‖teacher‖²).

    Raises:
        ValueError: the student's layers are not named as the teacher's, or the stream has no batches.
    """
    layers = pairs(teacher, student)
    heads_errors, layer_errors = ({name: _Error() for name in layers} for _ in range(2))
    logits_error, losses, tokens = _Error(), [0.0, 0.0], 0
    with evaluating(student), reporting("evaluate student", length_of(stream), progress) as advance:
        for ids in stream:
            seen = observe(teacher, ids)
            ids = ids.to(seen.logits.device)
            for name, heads in seen.layers.items():
                output = _outputs(layers[name], heads)
                result = layers[name].out(output.transpose(1, 2).flatten(2))
                heads_errors[name].add(output, heads.output, (0, 2, 3))
                layer_errors[name].add(result, heads.result)
            logits = logits_of(student, ids)
            logits_error.add(logits, seen.logits)
            for i, predicted in enumerate((seen.logits, logits)):
                losses[i] += F.cross_entropy(
                    predicted[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"
                ).item()
            tokens += ids[:, 1:].numel()
            advance()
    if not tokens:
        raise ValueError("stream must have at least one batch of two tokens or more, got none")
    each = {
        name: {"head_error": heads_errors[name].value(), "layer_error": layer_errors[name].value()}
        for name in layers
    }
    all_heads = [error for layer in each.values() for error in layer["head_error"]]
    return {
        "head_error": math.fsum(all_heads) / len(all_heads),
        "layer_error": math.fsum(layer["layer_error"] for layer in each.values()) / len(each),
        "logits_error": logits_error.value(),
        "teacher_loss": losses[0] / tokens,
        "student_loss": losses[1] / tokens,
        "tokens": tokens,
        "layers": each,
    }


def _outputs(layer: TopKAttention, heads: Heads) -> Tensor:
    """The layer's head outputs [B, H, T, D] for the teacher's input."""
    return layer.attend(*layer.split_heads(layer.qkv(heads.hidden)))
