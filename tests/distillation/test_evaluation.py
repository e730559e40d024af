"""The measures: zero for the teacher itself, by hand for others, and in the order that they must have."""

import copy

import pytest
import torch
from helpers import compare, oracle

from distillation.models import LENGTH, Teacher, batches
from sparse_attn.distillation import (
    attention_layers,
    baselines,
    evaluate,
    hybridize,
    observe,
    selection_quality,
)

NAMES = ["blocks.0.attention", "blocks.1.attention"]


@pytest.fixture(scope="module")
def teacher():
    return Teacher().eval()


def with_top_k(teacher, top_k):
    student = copy.deepcopy(teacher)
    for layer in attention_layers(student).values():
        layer.top_k = top_k
    return student


def relative(actual, wanted):
    return ((actual - wanted).double().norm() / wanted.double().norm()).item()


def test_selection_by_hand(teacher):
    """Two batches of unlike size; recall and top1 over the queries that have to leave keys out."""
    stream = [batches(1)[0], batches(1, seed=1)[0][:1]]
    found = selection_quality(teacher, {"recent": baselines.recent}, stream, budgets=(1, 5))["recent"]
    for name in NAMES:
        recalls, hits, outputs, results = {1: [], 5: []}, [], {1: [], 5: []}, []
        for ids in stream:
            heads = observe(teacher, ids).layers[name]
            scores = oracle.scores(heads.query, heads.key)
            seen = oracle.visible(heads.query, heads.key, is_causal=True)
            mass = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            hits.append((mass.argmax(-1) == torch.arange(LENGTH))[:, :, 1:].flatten())
            results.append(heads.result.flatten())
            for k in recalls:
                indices = baselines.recent(name, heads, k)
                chosen = compare.is_chosen(indices, LENGTH)
                recalls[k].append((mass * chosen).sum(-1)[:, :, k:].flatten())
                out, _ = oracle.gathered_attention(heads.query, heads.key, heads.value, indices)
                layer = attention_layers(teacher)[name]
                outputs[k].append(layer.out(out.float().transpose(1, 2).flatten(2)).flatten())
        layer = found["layers"][name]
        assert layer["top1"] == pytest.approx(torch.cat(hits).double().mean().item())
        for k in recalls:
            assert layer["recall"][k] == pytest.approx(torch.cat(recalls[k]).mean().item(), rel=1e-4)
            want = relative(torch.cat(outputs[k]), torch.cat(results))
            assert layer["layer_error"][k] == pytest.approx(want, rel=1e-3)
    for entry in ("recall", "layer_error"):
        both = [found["layers"][name][entry][5] for name in NAMES]
        assert found[entry][5] == pytest.approx(sum(both) / 2)


def test_exact_selection_holds_most(teacher):
    choosers = {"exact": baselines.exact, "recent": baselines.recent, "random": baselines.random(0)}
    found = selection_quality(teacher, choosers, batches(2), budgets=(2, 6))
    assert found["exact"]["top1"] == 1.0
    for k in (2, 6):
        assert found["exact"]["recall"][k] > max(found[n]["recall"][k] for n in ("recent", "random"))
        assert found["exact"]["recall"][k] <= 1.0 + 1e-6
    for name in choosers:
        assert found[name]["recall"][2] < found[name]["recall"][6]


def test_selection_does_not_depend_on_blocks(teacher, monkeypatch):
    choosers = {"exact": baselines.exact, "recent": baselines.recent}
    whole = selection_quality(teacher, choosers, batches(2), budgets=[3])
    monkeypatch.setattr("sparse_attn.wings.reference.chunks._ELEMENTS", 7 * 2 * 4 * LENGTH)
    parts = selection_quality(teacher, choosers, batches(2), budgets=[3])
    for name in choosers:
        assert parts[name]["top1"] == whole[name]["top1"]
        assert parts[name]["recall"][3] == pytest.approx(whole[name]["recall"][3], rel=1e-5)


def test_the_teacher_has_no_error_against_itself(teacher):
    found = evaluate(teacher, copy.deepcopy(teacher).train(), batches(2))
    assert found["head_error"] == found["layer_error"] == found["logits_error"] == 0.0
    assert found["student_loss"] == found["teacher_loss"]
    assert found["tokens"] == 2 * 2 * (LENGTH - 1)


def test_evaluation_by_hand(teacher):
    student, (ids,) = with_top_k(teacher, 3), batches(1)
    found = evaluate(teacher, student, [ids[:1], ids[1:]])
    seen, logits = observe(teacher, ids), student(ids).logits
    assert found["logits_error"] == pytest.approx(relative(logits, seen.logits), rel=1e-4)
    for key, predicted in (("teacher_loss", seen.logits), ("student_loss", logits)):
        log_p = predicted[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
        assert found[key] == pytest.approx(-log_p.mean().item(), rel=1e-4)
    for name, layer in attention_layers(student).items():
        heads = seen.layers[name]
        want, _, _ = oracle.topk_attention(heads.query, heads.key, heads.value, 3, is_causal=True)
        errors = [relative(want[:, h], heads.output[:, h]) for h in range(layer.num_heads)]
        assert found["layers"][name]["head_error"] == pytest.approx(errors, rel=1e-3)
        error = relative(layer(heads.hidden), heads.result)
        assert found["layers"][name]["layer_error"] == pytest.approx(error, rel=1e-3)
    means = [found["layers"][name]["layer_error"] for name in NAMES]
    assert found["layer_error"] == pytest.approx(sum(means) / 2)


def test_only_approximated_heads_have_errors(teacher):
    student = hybridize(teacher, {NAMES[1]: [2]}, max_length=LENGTH)
    found = evaluate(teacher, student, batches(1))["layers"]
    assert max(found[NAMES[0]]["head_error"]) == found[NAMES[0]]["layer_error"] == 0.0
    errors = found[NAMES[1]]["head_error"]
    assert errors.pop(2) > 0.1
    assert max(errors) < 1e-5


def test_more_keys_less_error(teacher):
    errors = [evaluate(teacher, with_top_k(teacher, k), batches(1))["logits_error"] for k in (2, 6, LENGTH)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4


def test_progress(teacher):
    calls = []
    choosers = {"recent": baselines.recent}
    selection_quality(
        teacher, choosers, batches(2), budgets=[2], progress=lambda *step: calls.append(step[:3])
    )
    evaluate(teacher, teacher, batches(1), progress=lambda *step: calls.append(step[:3]))
    assert calls == [("evaluate keys", 1, 2), ("evaluate keys", 2, 2), ("evaluate student", 1, 1)]


def test_errors(teacher):
    choosers = {"recent": baselines.recent}
    with pytest.raises(ValueError, match="budgets must be smaller than T = 24, got 24"):
        selection_quality(teacher, choosers, batches(1), budgets=(8, 24))
    with pytest.raises(ValueError, match="each of budgets must be at least 1, got 0"):
        selection_quality(teacher, choosers, batches(1), budgets=(0,))
    with pytest.raises(ValueError, match="stream must have at least one batch, got none"):
        selection_quality(teacher, choosers, [])
    with pytest.raises(ValueError, match="stream must have at least one batch of two tokens or more"):
        evaluate(teacher, teacher, [torch.zeros(2, 1, dtype=torch.int64)])
    with pytest.raises(ValueError, match="student must have the teacher's attention layers"):
        evaluate(teacher, Teacher(((4, 4),)), batches(1))
