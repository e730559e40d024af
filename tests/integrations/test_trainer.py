"""The Trainer's callback: a budget that falls with the steps, packed documents, resuming."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from transformers.trainer_callback import CallbackHandler  # noqa: E402

from sparse_attn.integrations import transformers as sparse_transformers  # noqa: E402
from sparse_attn.integrations.trainer import AnnealTopK  # noqa: E402
from tests.integrations.models import ids, llama  # noqa: E402

LENGTHS = (9, 30, 14, 24)


@pytest.mark.parametrize(
    ("start", "steps", "expected"),
    [
        (64, 4, [64, 39, 23, 14, 8, 8]),
        (64, 0.5, [64, 33, 16, 8, 8, 8]),
        (None, 4, [8] * 6),
        (8, 4, [8] * 6),
        (64, 0, [8] * 6),
    ],
)
def test_the_budget_of_each_step(start, steps, expected):
    callback = AnnealTopK(start, steps)
    found = [callback.top_k_at(step, end=8, most_steps=6) for step in range(6)]
    assert [abs(a - b) <= 1 for a, b in zip(found, expected, strict=True)] == [True] * 6, found
    assert found == sorted(found, reverse=True)


def test_blocks_stay_whole():
    found = [AnnealTopK(640, 10).top_k_at(n, end=192, most_steps=10, multiple_of=64) for n in range(11)]
    assert found[0] == 640
    assert found[-1] == 192
    assert all(n % 64 == 0 for n in found)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"start": 0}, ValueError, "start must be"),
        ({"start": "many"}, TypeError, "start must be"),
        ({"steps": 1.5}, ValueError, "a share from 0.0 to 1.0, got 1.5"),
        ({"steps": -1}, ValueError, "steps must be"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        AnnealTopK(**arguments)


class Budgets(transformers.TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **others):
        self.seen.append(model.config.sparse_attn_top_k)


class Loop:
    """What the Trainer does with its callbacks, without accelerate: as much of it as these tests look at."""

    def __init__(self, folder, model, documents, collator, callbacks, max_steps):
        self.folder, self.model, self.documents, self.collator = folder, model, documents, collator
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        self.state = transformers.TrainerState(max_steps=max_steps)
        self.handler = CallbackHandler(callbacks, model, None, self.optimizer, None)

    def batch(self, step):
        each = len(self.documents) // 4
        order = torch.randperm(
            len(self.documents), generator=torch.Generator().manual_seed(1 + step // each)
        ).view(each, 4)
        return self.collator([self.documents[n] for n in order[step % each]])

    def train(self, resume_from_checkpoint=None):
        args, state, control = SimpleNamespace(), self.state, transformers.TrainerControl()
        if resume_from_checkpoint is not None:
            saved = torch.load(Path(resume_from_checkpoint) / "all.pt", weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            state.global_step = saved["step"]
        self.handler.on_train_begin(args, state, control)
        for step in range(state.global_step, state.max_steps):
            self.handler.on_step_begin(args, state, control)
            loss = self.model(**self.batch(step)).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            state.global_step = step + 1
            self.handler.on_step_end(args, state, control)
            logs = {"loss": loss.item()}
            state.log_history.append({**logs, "step": state.global_step})
            self.handler.on_log(args, state, control, logs)
            if state.global_step % 3 == 0:
                to = Path(self.folder) / f"checkpoint-{state.global_step}"
                to.mkdir(parents=True, exist_ok=True)
                parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
                torch.save({**parts, "step": state.global_step}, to / "all.pt")
                self.handler.on_save(args, state, control)
        self.handler.on_train_end(args, state, control)


@pytest.fixture(params=["loop", "Trainer"])
def trainer(request):
    if request.param == "Trainer":
        pytest.importorskip("accelerate", reason="the Trainer needs accelerate")

    def new(folder, model, *, start=32, steps=4, max_steps=6, packed=True):
        tokens = ids(12, max(LENGTHS))
        documents = [{"input_ids": row[: LENGTHS[n % 4]].tolist()} for n, row in enumerate(tokens)]
        collator = transformers.DataCollatorWithFlattening() if packed else padded
        watch = Budgets()
        callbacks = [AnnealTopK(start, steps), watch]
        if request.param == "loop":
            return Loop(folder, model, documents, collator, callbacks, max_steps), watch
        arguments = transformers.TrainingArguments(
            str(folder), max_steps=max_steps, per_device_train_batch_size=4, logging_steps=1, report_to=[],
            use_cpu=True, save_steps=3, disable_tqdm=True, seed=1, learning_rate=1e-3,
        )  # fmt: skip
        return transformers.Trainer(
            model, arguments, train_dataset=documents, data_collator=collator, callbacks=callbacks
        ), watch

    return new


def padded(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    found = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(found)
    for n, row in enumerate(rows):
        found[n, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask[n, : len(row["input_ids"])] = 1
    return {"input_ids": found, "attention_mask": mask, "labels": torch.where(mask == 1, found, -100)}


@pytest.mark.parametrize("packed", [True, False])
def test_training(trainer, tmp_path, packed):
    model = sparse_transformers.configure(llama(), top_k=4, sinks=1).train()
    run, watch = trainer(tmp_path, model, packed=packed)
    run.train()
    assert watch.seen[0] == 32
    assert watch.seen[-1] == 4
    assert watch.seen == sorted(watch.seen, reverse=True)
    rows = [row for row in run.state.log_history if "loss" in row]
    assert [row["sparse_attn/top_k"] for row in rows] == watch.seen
    densities = [row["sparse_attn/density"] for row in rows]
    assert densities[0] == 1.0  # no document has more keys
    assert 0.1 < densities[-1] < 0.5
    assert all(a >= b - 0.05 for a, b in pairwise(densities))
    assert model.config.sparse_attn_top_k == 4
    assert not model._forward_pre_hooks


def test_density_counts_what_each_query_sees(trainer, tmp_path):
    """Four documents end to end: 1 + 2 + … of each, not of the row."""
    model = sparse_transformers.configure(llama(), top_k=4).train()
    run, _ = trainer(tmp_path, model, start=None, max_steps=3)
    run.train()
    visible = sum(n * (n + 1) // 2 for n in LENGTHS)
    kept = sum(sum(min(4, i + 1) for i in range(n)) for n in LENGTHS)
    rows = [row["sparse_attn/density"] for row in run.state.log_history if "loss" in row]
    # Batches are drawn anew; three of them are all twelve documents, each length three times.
    assert sum(rows) / 3 == pytest.approx(kept / visible, rel=0.2)


def test_a_resumed_training_goes_on_with_its_budget(trainer, tmp_path):
    def new():
        return sparse_transformers.configure(llama(), top_k=4).train()

    whole = new()
    run, watch = trainer(tmp_path / "whole", whole)
    run.train()
    run, first = trainer(tmp_path / "parts", new())
    run.train()
    again, second = trainer(tmp_path / "parts", new())
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert second.seen == watch.seen[3:]
    for a, b in zip(whole.parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_model_without_a_budget_is_refused(trainer, tmp_path):
    run, _ = trainer(tmp_path, llama())
    with pytest.raises(ValueError, match="AnnealTopK needs a model with a budget of keys"):
        run.train()
    model = sparse_transformers.configure(llama(), top_k=40).train()
    run, _ = trainer(tmp_path, model)
    with pytest.raises(ValueError, match="start must be at least the model's top_k, 40, got 32"):
        run.train()
    assert model.config.sparse_attn_top_k == 40
