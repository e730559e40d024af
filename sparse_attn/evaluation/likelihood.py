"""Text: a model's cross-entropy with sparse attention beside its own, and how far its predictions have moved."""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_attn.evaluation.arms import Arm
from sparse_attn.integrations import transformers as sparse_transformers

_ROWS = 256  # of logits that are worked on at a time


class Document(NamedTuple):
    """The beginning of a text."""

    name: str
    tokens: Tensor  # int64 [T + 1]

    @property
    def length(self) -> int:
        return len(self.tokens) - 1


class Predictions(NamedTuple):
    """What a model says of the last tokens of a document."""

    logits: Tensor  # [R, V]
    targets: Tensor  # int64 [R]

    def nats(self) -> float:
        """Mean cross-entropy."""
        parts = zip(self.logits.split(_ROWS), self.targets.split(_ROWS), strict=True)
        losses = [torch.nn.functional.cross_entropy(x.float(), y, reduction="sum").double() for x, y in parts]
        return float(sum(losses)) / len(self.targets)

    def divergence_to(self, other: Predictions) -> tuple[float, float]:
        """(mean KL divergence from `other` to this one in nats, how often both have the same likeliest token)."""
        total = same = 0.0
        for ours, theirs in zip(self.logits.split(_ROWS), other.logits.split(_ROWS), strict=True):
            log_p, log_q = (x.float().log_softmax(-1) for x in (theirs, ours))
            total += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
            same += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
        return total / len(self.targets), same / len(self.targets)


def use(model: torch.nn.Module, arm: Arm | None, keys: int | None, dense: str = "sdpa") -> None:
    """Gives the model the attention of an arm; None: dense attention, without this package, by its name."""
    if arm is None or keys is None:
        model.set_attn_implementation(dense)
    else:
        sparse_transformers.configure(model, self_test=False, **arm.options(keys))


@torch.no_grad()
def predictions(model: torch.nn.Module, tokens: Tensor, last: int) -> Predictions:
    """One forward over tokens [T + 1] but the last; what it says of the last `last` of them."""
    device = next(model.parameters()).device
    tokens = tokens.to(device)
    where = torch.arange(len(tokens) - 1 - last, len(tokens) - 1, device=device)
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    more = {"logits_to_keep": where} if keeps else {}
    logits = model(input_ids=tokens[None, :-1], use_cache=False, **more).logits[0]
    return Predictions(logits if keeps else logits[where], tokens[where + 1])
