"""Heads approximated by small networks, learned selections and exact ones, on one model trained on real text.

    sparse-attn study hybrid            three seeds
    sparse-attn study hybrid --quick    one seed, few steps: a smoke test

The teacher is a small causal GPT on characters. For each way to choose keys: how often its best key is the teacher's
best, the attention mass it holds, and the error of the layer's output with exact attention to those keys. For students
(models with heads replaced): errors of heads, layers and logits, and the loss. All on held-out text; a seed is a row,
and rows already in the results file are kept.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.studies import results
from sparse_attn.cli.console import count, refusals
from sparse_attn.demo.model import HEADS, LAYERS, WIDTH
from sparse_attn.demo.text import Corpus, load, windows
from sparse_attn.demo.train import Arm, Settings, train
from sparse_attn.distillation import (
    Frequencies,
    attention_layers,
    baselines,
    evaluate,
    hybridize,
    selection_quality,
    train_approximator,
    train_indexers,
    train_selector,
)
from sparse_attn.distillation.progress import Progress, reporting
from sparse_attn.nn import KeySelector

# What decides over the learning: batches of held-out text at the end, and of training text for the averages.
_HELD_OUT_BATCHES, _COUNTED_BATCHES = 8, 32
# Whether the selector's logits are for distances.
SELECTORS = {"KeySelector, positions": False, "KeySelector, distances": True}
INDEXERS = {"indexer, all heads": "all", "indexer, per head": "kv"}
QUICK = {"steps": 60, "selector_steps": 40, "approximator_steps": 20, "budgets": (8, 32), "context": 128}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    results.add_options(parser)
    parser.add_argument(
        "--text", help="a UTF-8 text (default: the State of the Union addresses of the package)"
    )
    parser.add_argument("--seeds", type=count(1), default=3, help="how many (default: 3)")
    parser.add_argument("--device", default="cpu", help="where to run (default: cpu)")


def execute(arguments: argparse.Namespace) -> int:
    found = results.start("hybrid", arguments)
    for seed in range(1 if arguments.quick else arguments.seeds):
        if found.row(seed=seed) is None:
            options = QUICK if arguments.quick else {}
            result = run(**options, seed=seed, text=arguments.text, device=arguments.device, progress=True)
            found.about["settings"] = result.pop("settings")
            found.add(json.loads(json.dumps({"seed": seed, **result})))  # as it will be read: keys are texts
    show(found)
    draw(found)
    found.wrote()
    return 0


def run(
    *,
    steps: int = 400,
    selector_steps: int = 400,
    approximator_steps: int = 200,
    budgets: Sequence[int] = (8, 32, 64, 128),
    context: int = 256,
    batch: int = 8,
    hidden: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
    text: str | None = None,
    progress: Progress | bool | None = None,
) -> dict:
    """Trains a small causal GPT on text, then all that learns from it, and measures that, for one seed.

    The teacher is the demo's model with dense attention, characters as tokens. All its heads get a selector for
    positions and one for distances, and its layers an indexer for all heads and one for each, all trained once on as
    many batches; then, for each budget, approximators for the keys of either selector.

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
        selector and layer); "selection" (see `selection_quality`, for each way to choose keys); "students" (see
        `evaluate`: by name and budget); "seconds", by stage.
    """
    device = torch.device(device)
    with refusals("--text " if text else ""):
        corpus = load(text, context)
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
    indexing = {}
    for name, share in INDEXERS.items():
        indexing[name] = train_indexers(teacher, stream, share=share, progress=progress)
        clock.lap(name)
    choosers = {
        "exact top-k": baselines.exact,
        **{name: baselines.learned(_selectors(student)) for name, student in selecting.items()},
        **{name: baselines.indexed(indexers) for name, indexers in indexing.items()},
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


def show(found: results.Results) -> None:
    budgets = found.about["settings"]["budgets"]

    def percent(get) -> str:
        return _spread([100 * get(row) for row in found.rows], "{:.1f}") + " %"

    results.show(
        "Choices of keys: top-1 accuracy, and by budget the attention mass they hold",
        ["choice", "top-1", *(f"mass, {k} keys" for k in budgets)],
        [
            [
                name,
                percent(lambda row, name=name: row["selection"][name]["top1"]),
                *(percent(lambda row, name=name, k=k: _by(row, name, "recall", k)) for k in budgets),
            ]
            for name in found.rows[0]["selection"]
        ],
    )
    results.show(
        "The same: error of the layer's output with exact attention to the keys",
        ["choice", *(f"{k} keys" for k in budgets)],
        [
            [name, *(percent(lambda row, name=name, k=k: _by(row, name, "layer_error", k)) for k in budgets)]
            for name in found.rows[0]["selection"]
        ],
    )
    losses = _spread([row["teacher"]["held_out_loss"] for row in found.rows], "{:.3f}")
    results.show(
        f"Students: errors relative to the teacher, whose loss is {losses} nats",
        ["heads", "keys", "head error", "layer error", "logits error", "loss over teacher"],
        [
            [
                name,
                str(k),
                *(
                    percent(lambda row, name=name, k=k, part=part: _student(row, name, k)[f"{part}_error"])
                    for part in ("head", "layer", "logits")
                ),
                _spread([_gap(_student(row, name, k)) for row in found.rows], "{:+.3f}"),
            ]
            for k in budgets
            for name in found.rows[0]["students"]
        ],
    )


def _by(row: dict, chooser: str, what: str, budget: int) -> float:
    return row["selection"][chooser][what][str(budget)]


def _student(row: dict, name: str, budget: int) -> dict:
    return row["students"][name][str(budget)]


def _gap(student: dict) -> float:
    return student["student_loss"] - student["teacher_loss"]


def _spread(values: list[float], form: str) -> str:
    """The mean, and of several seeds the standard deviation."""
    if len(values) == 1:
        return form.format(values[0])
    return f"{form.format(statistics.mean(values))} ± {form.format(statistics.stdev(values)).lstrip('+')}"


def draw(found: results.Results) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    budgets = found.about["settings"]["budgets"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 6), layout="constrained")
    for name in found.rows[0]["selection"]:
        errors = [statistics.mean(_by(row, name, "layer_error", k) for row in found.rows) for k in budgets]
        left.plot(budgets, errors, marker="o", label=name)
    for name in found.rows[0]["students"]:
        gaps = [statistics.mean(_gap(_student(row, name, k)) for row in found.rows) for k in budgets]
        right.plot(budgets, [max(1e-3, gap) for gap in gaps], marker="o", label=name)
    left.set(title="error of the layer's output, exact attention to the chosen keys", ylabel="relative error")
    right.set(title="whole students", ylabel="loss over the teacher's (nats; 0.001 = none)")
    for axis in (left, right):
        axis.set(
            xscale="log", yscale="log", xlabel=f"keys per query, of {found.about['settings']['context']}"
        )
        axis.set_xticks(budgets, [str(k) for k in budgets])
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle("What small networks, indexers and simple rules keep of a trained model's attention")
    figure.savefig(found.picture, dpi=110)
    plt.close(figure)


def _teacher(corpus: Corpus, settings: Settings, progress: Progress | bool | None) -> nn.Module:
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


def _random_batches(corpus: Corpus, count: int, batch: int, context: int, seed: int) -> list[Tensor]:
    """`count` batches of training windows, int64 [batch, context] each: a few megabytes of ids, not of activations."""
    return _batches(corpus.train, corpus.train_starts(count, batch, context, seed).flatten(), batch, context)


def _batches(ids: Tensor, starts: Tensor, batch: int, context: int) -> list[Tensor]:
    device = torch.device("cpu")  # the teacher's own is found when a batch is run
    return [windows(ids, some, context, device)[0] for some in starts.split(batch)]


class _Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now
