"""The demo from its first step to its last timing; the report is filled in place, so an interruption keeps it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from sparse_attn.demo import pace, text, timing
from sparse_attn.demo.keys import chosen_keys
from sparse_attn.demo.report import Report
from sparse_attn.demo.train import train

SAMPLE_LENGTH, PROMPT_LENGTH = 320, 60


class Stage(Protocol):
    """Where one stage's progress is shown."""

    def begin(self) -> None: ...

    def advance(self, note: str = "") -> None: ...


def prepare(report: Report, most_steps: int | None, stage: Stage) -> None:
    """Measures a training step of each arm, and fits the steps to `report.seconds` where those are given.

    Once fitted, the steps stay: the rate of learning depends on how many there will be.
    """
    stage.begin()
    for arm in report.arms:
        report.paces.append(pace.measure(arm, report.corpus, report.settings))
        stage.advance(arm.name)
    if report.seconds is not None:
        steps = pace.fitted_steps(report.paces, report.seconds, most_steps)
        report.settings = replace(report.settings, steps=steps)


def seconds_ahead(report: Report, timing_seconds: float) -> float:
    """How long `run` will take; `timing_seconds` is 0 where there is no timing."""
    training = sum(each.training(report.settings.steps) for each in report.paces)
    # A character is a forward pass of one window, a training step the forward and backward passes of a batch.
    sampling = SAMPLE_LENGTH * report.paces[1].step / (2 * report.settings.batch)
    return training + sampling + timing_seconds


def run(
    report: Report, lengths: Sequence[int], timing_seconds: float, stage: Callable[[str, int], Stage]
) -> None:
    """Trains the arms, samples from the top-k model, times attention; `stage(name, steps)` makes their bars."""
    settings, corpus = report.settings, report.corpus
    training = [stage(f"train {arm.name}", settings.steps) for arm in report.arms]
    sampling = stage("sample", SAMPLE_LENGTH)
    timed = stage("timing", len(lengths)) if lengths else None
    for arm, bar in zip(report.arms, training, strict=True):
        bar.begin()
        train(arm, corpus, settings, lambda loss, bar=bar: bar.advance(f"loss {loss:.3f}"))

    sampling.begin()
    model = report.arms[1].model
    report.keys = chosen_keys(model, corpus)
    report.prompt = text.opening(corpus, min(PROMPT_LENGTH, settings.context))
    for token in model.generate(corpus.encode(report.prompt), SAMPLE_LENGTH, settings.seed):
        report.sample += corpus.alphabet[token]
        sampling.advance()

    if timed:
        timed.begin()
        report.timing = timing.start(settings.top_k, settings.device)
        for done in timing.measure(
            report.timing, list(lengths), settings.device, settings.seed, timing_seconds
        ):
            timed.advance(f"T={done:,} done")
