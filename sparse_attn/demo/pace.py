"""How long a training step takes on this machine, and how many of them a time allows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sparse_attn.demo.optimizers import optimizers_of
from sparse_attn.demo.text import Corpus, windows
from sparse_attn.demo.train import EVALUATIONS, Arm, Settings, model_of, train_step, validation_loss

WARM_UP = 2
FEWEST, MOST = 3, 20  # steps measured
PATIENCE, TOO_LONG = 1.5, 6.0  # seconds after which FEWEST steps are enough, and after which one is


@dataclass(frozen=True)
class Pace:
    """Seconds of one arm's training step and of one look at its validation loss."""

    step: float
    validation: float

    def training(self, steps: int) -> float:
        """Seconds of `steps` steps."""
        return steps * self.step + min(EVALUATIONS, steps) * self.validation


def measure(arm: Arm, corpus: Corpus, settings: Settings) -> Pace:
    """Some steps of a model that is thrown away. What only the first calls in a process cost is left out, and after
    this belongs to no arm's training."""
    model = model_of(arm, corpus, settings)
    optimizers = optimizers_of(model)
    batches = corpus.train_starts(WARM_UP + MOST, settings.batch, settings.context, settings.seed)
    seconds: list[float] = []
    start = time.perf_counter()
    for number, starts in enumerate(batches):
        began = time.perf_counter()
        train_step(model, optimizers, *windows(corpus.train, starts, settings.context, settings.device))
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - began)
        waited = time.perf_counter() - start
        if (len(seconds) >= FEWEST and waited > PATIENCE) or (seconds and waited > TOO_LONG):
            break
    began = time.perf_counter()
    validation_loss(model, corpus, settings)
    return Pace(statistics.median(seconds), time.perf_counter() - began)


def fitted_steps(paces: Sequence[Pace], seconds: float, most: int | None = None) -> int:
    """The steps that each arm can take if all arms together have `seconds`; one per evaluation at least, so that
    there is something to show."""
    looks = EVALUATIONS * sum(pace.validation for pace in paces)
    steps = int((seconds - looks) / sum(pace.step for pace in paces))
    steps = steps if most is None else min(steps, most)
    return max(steps // EVALUATIONS, 1) * EVALUATIONS
