"""Text: a model's cross-entropy with sparse attention beside its own, and how far its predictions have moved."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_attn.evaluation.arms import Arm
from sparse_attn.integrations import transformers as sparse_transformers
from sparse_attn.integrations.options import NAME

_AT_ONCE = 1 << 24  # logits that are worked on at a time
_KEPT = 1 << 28  # that are kept at most; of more their hidden states are


class Document(NamedTuple):
    """The beginning of a text."""

    name: str
    tokens: Tensor  # int64 [T + 1]

    @property
    def length(self) -> int:
        return len(self.tokens) - 1


@dataclass(frozen=True)
class Predictions:
    """What a model says of the last tokens of a document."""

    targets: Tensor  # int64 [R]
    said: Tensor  # its logits, [R, V], or [R, C], of which `head` makes them
    vocabulary: int  # V
    head: Callable[[Tensor], Tensor] | None = None

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(logits float32 [r, V], targets [r]), some rows at a time."""
        rows = max(1, _AT_ONCE // self.vocabulary)
        for said, targets in zip(self.said.split(rows), self.targets.split(rows), strict=True):
            yield (said if self.head is None else self.head(said)).float(), targets

    @torch.no_grad()
    def beside(self, other: Predictions | None) -> tuple[float, float, float]:
        """(mean cross-entropy, mean KL divergence from `other` to this one in nats, how often both have the same
        likeliest token); None: this one itself."""
        nats = divergence = same = 0.0
        theirs = None if other is None else other.parts()
        for ours, targets in self.parts():
            log_q = ours.log_softmax(-1)
            nats -= float(log_q.gather(-1, targets[:, None]).double().sum())
            log_p = log_q if theirs is None else next(theirs)[0].log_softmax(-1)
            if theirs is not None:
                divergence += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
            same += float((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        count = len(self.targets)
        return nats / count, divergence / count, same / count


def use(model: torch.nn.Module, arm: Arm | None, keys: int | None, dense: str = "sdpa") -> None:
    """Gives the model the attention of an arm; None: dense attention by its name, without this package or of it."""
    if arm is not None and keys is not None:
        sparse_transformers.configure(model, self_test=False, **arm.options(keys))
    elif dense == NAME:
        sparse_transformers.configure(model, self_test=False, top_k=None)
    else:
        model.set_attn_implementation(dense)


@torch.no_grad()
def predictions(model: torch.nn.Module, tokens: Tensor, last: int) -> Predictions:
    """One forward over tokens [T + 1] but the last; what it says of the last `last` of them."""
    device = next(model.parameters()).device
    tokens = tokens.to(device)
    where = torch.arange(len(tokens) - 1 - last, len(tokens) - 1, device=device)
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    vocabulary = model.config.get_text_config().vocab_size if keeps else 0
    if last * vocabulary > _KEPT:
        found = _hidden_states(model, tokens, where, vocabulary)
        if found is not None:
            return found
    more = {"logits_to_keep": where} if keeps else {}
    logits = model(input_ids=tokens[None, :-1], use_cache=False, **more).logits[0]
    return Predictions(tokens[where + 1], logits if keeps else logits[where], logits.shape[-1])


def _hidden_states(
    model: torch.nn.Module, tokens: Tensor, where: Tensor, vocabulary: int
) -> Predictions | None:
    """What the head is given; None where the model makes its logits of something else than that."""
    base = getattr(model, model.base_model_prefix, model)
    if base is model:
        return None
    kept: list[Any] = []
    hook = base.register_forward_hook(lambda module, given, output: kept.append(output))
    try:
        theirs = model(input_ids=tokens[None, :-1], use_cache=False, logits_to_keep=1).logits[0]
    finally:
        hook.remove()
    hidden = getattr(kept[0], "last_hidden_state", None) if len(kept) == 1 else None
    if hidden is None or hidden.shape[:2] != (1, len(tokens) - 1):
        return None
    head = partial(_head, model, base, type(kept[0]))
    found = Predictions(tokens[where + 1], hidden[0, where], vocabulary, head)
    try:
        ours = head(found.said[-1:])
    except (AttributeError, IndexError, TypeError, ValueError):
        return None  # it wants more of its base than that
    alike = ours.shape == theirs.shape and torch.allclose(
        ours, theirs, rtol=0.0, atol=0.01 * float(theirs.abs().max())
    )
    return found if alike else None


def _head(model: torch.nn.Module, base: torch.nn.Module, kind: type, hidden: Tensor) -> Tensor:
    """Logits [r, V] of hidden states [r, C], by the model's own forward: with its soft caps, scales and biases.

    `kind` is the class of what its base returns.
    """
    output = kind(last_hidden_state=hidden[None])
    before = base.__dict__.get("forward")
    base.__dict__["forward"] = lambda *given, **named: output
    try:
        ids = torch.zeros((1, len(hidden)), dtype=torch.int64, device=hidden.device)
        return model(input_ids=ids, use_cache=False).logits[0]
    finally:
        del base.__dict__["forward"]
        if before is not None:
            base.__dict__["forward"] = before
