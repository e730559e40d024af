"""Trains one arm of the demo and keeps what was done, so that an interruption loses nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import sparse_attn
from sparse_attn.demo.memory import PeakMemory
from sparse_attn.demo.model import GPT, HEADS, WIDTH
from sparse_attn.demo.optimizers import optimizers_of
from sparse_attn.demo.text import Corpus, windows
from sparse_attn.planner import WidthPlan, plan_widths

EVALUATIONS = 5
WARM_UP = 10  # steps over which the learning rate rises


@dataclass(frozen=True)
class Settings:
    """What all arms share."""

    steps: int  # 0 while they are not fitted to the time
    batch: int
    context: int
    top_k: int
    window: int  # of the top_k keys, how many are always the latest
    seed: int
    device: torch.device
    embedding: str = "dense"  # "variable" adds an arm


@dataclass
class Arm:
    """One of the models, and what its training has shown so far."""

    name: str
    top_k: int | None
    window: int
    kernel: str
    plan: WidthPlan | None = None  # widths of the embedding and the head; None: nn.Embedding and nn.Linear
    train_loss: list[float] = field(default_factory=list)  # nats per character, one per step
    validation: list[tuple[int, float]] = field(default_factory=list)  # (steps done, nats per character)
    step_seconds: list[float] = field(default_factory=list)
    step_tokens: int = 0
    peak_memory: int | None = None  # bytes
    model: GPT | None = field(default=None, repr=False)

    @property
    def validation_loss(self) -> float | None:
        return self.validation[-1][1] if self.validation else None

    @property
    def tokens_per_second(self) -> float | None:
        """By the median step: what else the machine does for a while is not the arm's doing."""
        return self.step_tokens / statistics.median(self.step_seconds) if self.step_seconds else None


def arms_of(settings: Settings, corpus: Corpus) -> list[Arm]:
    """Dense, top-k, and where it is asked for top-k with an embedding of variable width, untrained.

    Raises:
        ValueError: the text's alphabet has no plan of widths.
    """
    query = torch.empty(settings.batch, HEADS, settings.context, WIDTH // HEADS, device=settings.device)
    wing = sparse_attn.explain(
        query, query, query, settings.top_k, is_causal=True, window=settings.window
    ).backend
    kernel = f"{wing} wing"
    arms = [
        Arm("dense", None, 0, "PyTorch SDPA"),
        Arm("top-k", settings.top_k, settings.window, kernel),
    ]
    if settings.embedding == "variable":
        plan = _plan_of(corpus)
        arms.append(Arm("top-k + widths", settings.top_k, settings.window, kernel, plan))
    return arms


def _plan_of(corpus: Corpus) -> WidthPlan:
    """Widths from the training text's own counts, at half the parameters of a full table."""
    counts = torch.bincount(corpus.train, minlength=len(corpus.alphabet))
    try:
        return plan_widths(counts, WIDTH, ratio=0.5)
    except ValueError as error:
        raise ValueError(f"an alphabet of {len(counts)} characters has no such plan ({error})") from None


def train_step(model: GPT, optimizers: list[torch.optim.Optimizer], ids: Tensor, targets: Tensor) -> float:
    """One step on ids and targets [B, T]; the loss before it."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss = model.loss(ids, targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    return loss.item()


@torch.no_grad()
def validation_loss(model: GPT, corpus: Corpus, settings: Settings) -> float:
    """Nats per character over the fixed windows of the held-out text."""
    total, count = 0.0, 0
    with model.evaluating():
        for starts in corpus.held_out_starts(settings.context).split(settings.batch):
            ids, targets = windows(corpus.held_out, starts, settings.context, settings.device)
            total += model.loss(ids, targets, reduction="sum").item()
            count += targets.numel()
    return total / count


def train(arm: Arm, corpus: Corpus, settings: Settings, progress: Callable[[float], None]) -> None:
    """Trains `arm` in place; calls progress(loss) after each step."""
    starts = corpus.train_starts(settings.steps, settings.batch, settings.context, settings.seed)
    memory = PeakMemory(settings.device)
    torch.manual_seed(settings.seed)  # all arms start from the same weights
    model = arm.model = model_of(arm, corpus, settings)
    optimizers = optimizers_of(model)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    evaluations = {round(settings.steps * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS)}
    for step in range(settings.steps):
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * _schedule(step, settings.steps)
        began = time.perf_counter()
        ids, targets = windows(corpus.train, starts[step], settings.context, settings.device)
        loss = train_step(model, optimizers, ids, targets)
        arm.step_seconds.append(time.perf_counter() - began)
        arm.step_tokens = ids.numel()
        arm.train_loss.append(loss)
        arm.peak_memory = memory.peak()
        progress(loss)
        if step + 1 in evaluations:
            arm.validation.append((step + 1, validation_loss(model, corpus, settings)))


def model_of(arm: Arm, corpus: Corpus, settings: Settings) -> GPT:
    """The arm's model, with new weights."""
    vocabulary = len(corpus.alphabet)
    return GPT(vocabulary, settings.context, arm.top_k, arm.window, arm.plan).to(settings.device)


def _schedule(step: int, steps: int) -> float:
    """Up in WARM_UP steps, then down in a line to a tenth."""
    return min(1.0, (step + 1) / WARM_UP) * (1.0 - 0.9 * step / steps)
