"""The study of approximated heads: what a KeySelector and a HeadApproximator keep of a model trained on real text."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparse_attn.cli import demo_text
from sparse_attn.cli.console import table
from sparse_attn.cli.demo_model import HEADS, LAYERS, WIDTH
from sparse_attn.cli.demo_train import Arm, Settings, train
from sparse_attn.distillation import (
    Frequencies,
    attention_layers,
    baselines,
    evaluate,
    hybridize,
    selection_quality,
    train_approximator,
    train_selector,
)
from sparse_attn.distillation.progress import Progress, reporting
from sparse_attn.nn import KeySelector

# What decides over the learning: batches of held-out text at the end, and of training text for the averages.
_HELD_OUT_BATCHES, _COUNTED_BATCHES = 8, 32
# Whether the selector's logits are for distances.
SELECTORS = {"KeySelector, positions": False, "KeySelector, distances": True}


def run(
    *,
    steps: int = 400,
    selector_steps: int = 400,
    approximator_steps: int = 200,
    budgets: Sequence[int] = (8, 16, 32),
    context: int = 256,
    batch: int = 8,
    hidden: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
    text: str | None = None,
    progress: Progress | bool | None = None,
) -> dict:
    """Trains a small causal GPT on text, then a KeySelector and HeadApproximators on it, and measures them.

    The teacher is the demo's model with dense attention, characters as tokens. All its heads get a selector for
    positions and one for distances, each trained once; then, for each budget, approximators for the keys of either.
    Everything is measured on held-out text.

    Args:
        steps: training steps of the teacher.
        selector_steps, approximator_steps: training steps of the networks (of the latter for each budget).
        budgets: keys per query.
        context, batch: characters in a window, windows in a step.
        hidden: width of the networks' hidden layers.
        seed: of weights and data order.
        device: where to run.
        text: path of a UTF-8 text; None is the State of the Union addresses of the package.
        progress: True for progress bars, or a function called with (name, done, total or None, note).

    Returns:
        A dict of plain numbers: "settings"; "teacher" (its loss); "selector_loss" (mean of the last 20 steps, by
        selector and layer); "selection" (see `selection_quality`, for each way to
        choose keys); "students" (see `evaluate`: by name and budget); "seconds", by stage. `tables` prints it.

    Example:
        >>> from sparse_attn.cli import study_hybrid
        >>> print(study_hybrid.tables(study_hybrid.run(progress=True)))  # doctest: +SKIP
    """
    device = torch.device(device)
    corpus = demo_text.load(text, context)
    clock = _Clock()
    teacher = _teacher(corpus, Settings(steps, batch, context, max(budgets), 0, seed, device), progress)
    clock.lap("teacher")
    held_out = _batches(
        corpus.held_out, corpus.held_out_starts(context)[: _HELD_OUT_BATCHES * batch], batch, context
    )

    counted = _random_batches(corpus, _COUNTED_BATCHES, batch, context, seed + 1)
    frequencies = Frequencies(teacher, counted, progress=progress)
    clock.lap("averages")
    torch.manual_seed(seed)  # of the networks' first weights
    stream = _random_batches(corpus, selector_steps, batch, context, seed + 2)
    selecting, selector_loss = {}, {}
    for name, relative in SELECTORS.items():
        selecting[name] = hybridize(
            teacher, max_length=context, approximate_output=False, hidden=hidden, relative=relative
        )
        losses = train_selector(teacher, selecting[name], stream, progress=progress)
        selector_loss[name] = {layer: sum(each[-20:]) / len(each[-20:]) for layer, each in losses.items()}
        clock.lap(name)
    choosers = {
        "exact top-k": baselines.exact,
        **{name: baselines.learned(_selectors(student)) for name, student in selecting.items()},
        "frequent distances": frequencies.distances,
        "frequent positions": frequencies.positions,
        "last keys": baselines.recent,
        "random keys": baselines.random(seed),
    }
    selection = selection_quality(teacher, choosers, held_out, budgets=budgets, progress=progress)
    clock.lap("selection")

    students: dict[str, dict[int, dict]] = {}
    for k in budgets:
        stream = _random_batches(corpus, approximator_steps, batch, context, seed + 3)
        for name, student in _students(teacher, selecting, k, stream, progress).items():
            students.setdefault(name, {})[k] = evaluate(teacher, student, held_out)
        clock.lap(f"students at {k} keys")
    return {
        "settings": {
            "text": corpus.name,
            "vocabulary": len(corpus.alphabet),
            "width": WIDTH,
            "heads": HEADS,
            "layers": LAYERS,
            "steps": steps,
            "selector_steps": selector_steps,
            "approximator_steps": approximator_steps,
            "budgets": list(budgets),
            "context": context,
            "batch": batch,
            "hidden": hidden,
            "seed": seed,
            "device": str(device),
            "threads": torch.get_num_threads(),
            "held_out_tokens": sum(ids.numel() for ids in held_out),
        },
        "teacher": {"held_out_loss": next(iter(students.values()))[budgets[0]]["teacher_loss"]},
        "selector_loss": selector_loss,
        "selection": selection,
        "students": students,
        "seconds": clock.laps,
    }


def tables(result: dict) -> str:
    """What `run` returned, as plain text: the choices of keys, then the students."""
    budgets, percent = result["settings"]["budgets"], "{:.1%}".format
    choices = [
        [
            name,
            percent(chosen["top1"]),
            *(percent(chosen["recall"][k]) for k in budgets),
            *(percent(chosen["layer_error"][k]) for k in budgets),
        ]
        for name, chosen in result["selection"].items()
    ]
    students = [
        [
            name,
            str(k),
            *(percent(found[k][f"{part}_error"]) for part in ("head", "layer", "logits")),
            f"{found[k]['student_loss'] - found[k]['teacher_loss']:+.3f}",
        ]
        for k in budgets
        for name, found in result["students"].items()
    ]
    return "\n\n".join(
        (
            table(
                "keys: top-1 accuracy; by budget recall of attention mass, layer error with exact attention to them",
                ["choice", "top-1", *(f"recall {k}" for k in budgets), *(f"error {k}" for k in budgets)],
                choices,
            ),
            table(
                f"students: errors relative to the teacher, its loss is {result['teacher']['held_out_loss']:.3f} nats",
                ["heads", "keys", "head error", "layer error", "logits error", "loss"],
                students,
            ),
        )
    )


def _teacher(corpus: demo_text.Corpus, settings: Settings, progress: Progress | bool | None) -> nn.Module:
    """The demo's dense model, trained as the demo does."""
    arm = Arm("dense", None, 0, "PyTorch SDPA")
    with reporting("train teacher", settings.steps, progress) as advance:
        train(arm, corpus, settings, lambda loss: advance(f"loss {loss:.3f}"))
    return arm.model.eval()


def _students(
    teacher: nn.Module,
    selecting: dict[str, nn.Module],  # with trained selectors and exact attention to their keys
    top_k: int,
    stream: list[Tensor],
    progress: Progress | bool | None,
) -> dict[str, nn.Module]:
    """Models with top_k keys per query, by name."""
    exact, recent = copy.deepcopy(teacher), copy.deepcopy(teacher)
    for layer in attention_layers(exact).values():
        layer.top_k = top_k
    for layer in attention_layers(recent).values():
        layer.top_k = layer.window = top_k
    students = {"exact top-k": exact, "last keys": recent}
    for name, student in selecting.items():
        student = students[f"{name}, exact attention"] = copy.deepcopy(student)
        for selector in _selectors(student).values():
            selector.top_k = top_k
    for name, student in selecting.items():
        hybrid = _like(student, teacher, "all", top_k)
        train_approximator(teacher, hybrid, stream, progress=progress)
        students[f"{name}, HeadApproximator"] = hybrid
        students[f"{name}, HeadApproximator, half of the heads"] = _like(
            hybrid, teacher, range(HEADS // 2), top_k
        )
    return students


def _like(student: nn.Module, teacher: nn.Module, heads: str | Sequence[int], top_k: int) -> nn.Module:
    """The teacher with `heads` approximated by the networks that `student` has for its first heads, if it has them."""
    selector = next(iter(_selectors(student).values()))
    made = hybridize(
        teacher,
        heads,
        max_length=selector.max_length,
        approximated_top_k=top_k,
        hidden=selector.hidden,
        relative=selector.relative,
    )
    for name, layer in attention_layers(made).items():
        count = len(layer.approximated_heads)
        given = attention_layers(student)[name]
        for target, source in ((layer.selector, given.selector), (layer.approximator, given.approximator)):
            if source is not None:
                target.load_state_dict({key: tensor[:count] for key, tensor in source.state_dict().items()})
    return made


def _selectors(student: nn.Module) -> dict[str, KeySelector]:
    """The selectors of a student by the names of their layers."""
    return {name: layer.selector for name, layer in attention_layers(student).items()}


def _random_batches(
    corpus: demo_text.Corpus, count: int, batch: int, context: int, seed: int
) -> list[Tensor]:
    """`count` batches of training windows, int64 [batch, context] each: a few megabytes of ids, not of activations."""
    return _batches(corpus.train, corpus.train_starts(count, batch, context, seed).flatten(), batch, context)


def _batches(ids: Tensor, starts: Tensor, batch: int, context: int) -> list[Tensor]:
    device = torch.device("cpu")  # the teacher's own is found when a batch is run
    return [demo_text.windows(ids, some, context, device)[0] for some in starts.split(batch)]


class _Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now
