"""What the demo found, and the same as plain data for programs."""

from __future__ import annotations

import math
import platform
from dataclasses import asdict, dataclass, field

import torch

import sparse_attn
from sparse_attn.demo.keys import ChosenKeys
from sparse_attn.demo.model import HEADS as MODEL_HEADS
from sparse_attn.demo.model import LAYERS, WIDTH
from sparse_attn.demo.pace import Pace
from sparse_attn.demo.text import Corpus
from sparse_attn.demo.timing import HEAD_DIM, HEADS, Timing
from sparse_attn.demo.train import Arm, Settings


@dataclass
class Report:
    """Filled as the demo goes."""

    settings: Settings
    corpus: Corpus
    arms: list[Arm]
    paces: list[Pace] = field(default_factory=list)  # of the arms, measured before the training
    seconds: float | None = (
        None  # of training, to which the steps were fitted; None: the steps were asked for
    )
    prompt: str = ""
    sample: str = ""
    keys: ChosenKeys | None = None
    timing: Timing | None = None
    interrupted: bool = False
    error: str | None = None
    files: dict[str, str] = field(default_factory=dict)


def as_json(report: Report) -> dict:
    """Everything, as plain data."""
    return {
        "settings": {**asdict(report.settings), "device": str(report.settings.device)},
        "steps": report.settings.steps,
        "steps_fitted": report.seconds is not None,
        "seconds_fitted_to": report.seconds,
        "versions": {
            "sparse_attn": sparse_attn.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        },
        "text": {
            "name": report.corpus.name,
            "characters": len(report.corpus.train) + len(report.corpus.held_out),
            "held_out_characters": len(report.corpus.held_out),
            "alphabet": len(report.corpus.alphabet),
        },
        "model": {"layers": LAYERS, "width": WIDTH, "heads": MODEL_HEADS},
        "arms": {arm.name: _arm(arm) for arm in report.arms},
        "sample": {"prompt": report.prompt, "text": report.sample},
        "timing": _timing(report.timing),
        "chosen_keys": asdict(report.keys) if report.keys else None,
        "interrupted": report.interrupted,
        "error": report.error,
        "files": report.files,
    }


def _arm(arm: Arm) -> dict:
    nats = arm.validation_loss
    return {
        "top_k": arm.top_k,
        "window": arm.window,
        "kernel": arm.kernel,
        "embedding": embedding_of(arm),
        "steps_done": len(arm.train_loss),
        "validation_nats_per_character": _finite(nats),
        "validation_bits_per_character": _finite(nats / math.log(2)) if nats is not None else None,
        "tokens_per_second": arm.tokens_per_second,
        "peak_memory_bytes": arm.peak_memory,
        "seconds": sum(arm.step_seconds),
        "train_loss": [_finite(loss) for loss in arm.train_loss],
        "validation": [{"step": step, "nats_per_character": _finite(loss)} for step, loss in arm.validation],
    }


def embedding_of(arm: Arm) -> dict:
    """Of the embedding and the head: how wide, and how many numbers together (None before the model is made)."""
    plan = arm.plan
    return {
        "widths": [WIDTH] if plan is None else list(plan.widths),
        "characters": None if plan is None else list(plan.band_sizes),
        "parameters": arm.model.vocabulary_parameters() if arm.model else None,
    }


def _finite(value: float | None) -> float | None:
    """JSON knows no NaN."""
    return value if value is not None and math.isfinite(value) else None


def _timing(timing: Timing | None) -> dict | None:
    if timing is None:
        return None
    shape = {"batch": 1, "heads": HEADS, "head_dim": HEAD_DIM, "dtype": "float32", "causal": True}
    return {
        "wing": timing.wing,
        "top_k": timing.top_k,
        "shape": shape,
        "seconds": {str(length): row for length, row in timing.seconds.items()},
        "skipped": timing.skipped,
        "largest_error_against_plain_pytorch": timing.largest_error,
    }
