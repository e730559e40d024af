"""Students: made from a teacher without changing it, and trained on it, each part alone."""

import copy

import pytest
import torch

from distillation.models import LENGTH, Teacher, batches
from sparse_attn.demo.model import GPT
from sparse_attn.distillation import attention_layers, hybridize, train_approximator, train_selector
from sparse_attn.nn import HybridAttention

NAMES = ["blocks.0.attention", "blocks.1.attention"]


def student_of(teacher, heads="all", **options):
    torch.manual_seed(5)
    return hybridize(
        teacher, heads, **({"max_length": LENGTH, "approximated_top_k": 4, "hidden": 16} | options)
    )


@pytest.mark.parametrize(
    ("heads", "want"),
    [
        ("all", [(0, 1, 2, 3), (0, 1, 2, 3, 4, 5)]),
        ([2, 0], [(0, 2), (0, 2)]),
        ({NAMES[1]: [5]}, [(), (5,)]),
        ({}, [(), ()]),
    ],
)
def test_hybridize(heads, want):
    teacher = Teacher()
    before = copy.deepcopy(teacher.state_dict())
    student = student_of(teacher, heads)
    layers = attention_layers(student)
    assert [layer.approximated_heads for layer in layers.values()] == want
    assert all(isinstance(layer, HybridAttention) for layer in layers.values())
    assert not any(isinstance(layer, HybridAttention) for layer in attention_layers(teacher).values())
    for name, tensor in before.items():
        assert torch.equal(student.state_dict()[name], tensor)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(teacher.state_dict()[name], tensor) for name, tensor in before.items())


def test_without_approximated_heads_it_is_the_teacher():
    teacher, (ids,) = Teacher().eval(), batches(1)
    assert torch.equal(student_of(teacher, {})(ids).logits, teacher(ids).logits)


@pytest.mark.torch_defaults
@pytest.mark.parametrize("heads", ["all", {NAMES[0]: [1], NAMES[1]: [0, 3]}])
def test_train_selector(heads):
    """The loss falls well below its start in every layer, and nothing but the selectors changes."""
    teacher = Teacher()
    student = student_of(teacher, heads, hidden=64)
    before = [copy.deepcopy(model.state_dict()) for model in (teacher, student)]
    history = train_selector(teacher, student, batches(1) * 150, learning_rate=1e-2)
    assert list(history) == NAMES
    for losses in history.values():
        assert len(losses) == 150
        assert losses[-1] < 0.5 * losses[0]
    for model, state in zip((teacher, student), before, strict=True):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name]) == ("selector" not in name), name


@pytest.mark.torch_defaults
def test_train_approximator():
    teacher = Teacher()
    student = student_of(teacher, hidden=64)
    before = [copy.deepcopy(model.state_dict()) for model in (teacher, student)]
    history = train_approximator(teacher, student, batches(1) * 150, learning_rate=1e-2)
    for losses in history.values():
        assert losses[-1] < 0.2 * losses[0]
    for model, state in zip((teacher, student), before, strict=True):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name]) == ("approximator" not in name), name


def test_losses_of_blocks_are_those_of_the_whole(monkeypatch):
    teacher = Teacher()
    whole = train_selector(teacher, student_of(teacher), batches(3))
    monkeypatch.setattr("sparse_attn.wings.reference.chunks._ELEMENTS", 7 * 2 * 4 * LENGTH)
    parts = train_selector(teacher, student_of(teacher), batches(3))
    for name in NAMES:
        assert parts[name] == pytest.approx(whole[name], rel=1e-4)


def test_each_layer_learns_alone():
    """A layer's losses do not depend on which other layers are trained beside it."""
    teacher = Teacher()
    both, alone = student_of(teacher), student_of(teacher, {NAMES[1]: range(6)})
    layers = [attention_layers(model)[NAMES[1]].selector for model in (both, alone)]
    layers[1].load_state_dict(layers[0].state_dict())
    first, second = (train_selector(teacher, model, batches(3)) for model in (both, alone))
    assert list(second) == NAMES[1:]
    assert second[NAMES[1]] == pytest.approx(first[NAMES[1]], rel=1e-5)


def test_the_same_run_again_gives_the_same_losses():
    teacher = Teacher()
    runs = []
    for _ in range(2):
        student = student_of(teacher)
        runs.append(
            (train_selector(teacher, student, batches(2)), train_approximator(teacher, student, batches(2)))
        )
    assert runs[0] == runs[1]


def test_streams_and_progress():
    """A list has a total and lets the rate fall; a generator has neither; the function hears of every step."""
    teacher = Teacher()
    calls = []
    train_selector(teacher, student_of(teacher), batches(3), progress=lambda *step: calls.append(step))
    assert [call[:3] for call in calls] == [("train selector", i, 3) for i in (1, 2, 3)]
    assert all(call[3].startswith("loss ") for call in calls)
    calls.clear()
    train_approximator(
        teacher, student_of(teacher), iter(batches(2)), progress=lambda *step: calls.append(step)
    )
    assert [call[:3] for call in calls] == [("train approximator", i, None) for i in (1, 2)]
    assert train_selector(teacher, student_of(teacher), []) == {name: [] for name in NAMES}


def test_the_demos_model():
    teacher = GPT(vocabulary=20, context=LENGTH, top_k=None)
    student = student_of(teacher, [0, 3])
    train_selector(teacher, student, batches(2))
    train_approximator(teacher, student, batches(2))
    assert student(batches(1)[0]).shape == (2, LENGTH, 20)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda t: hybridize(t, "some"), ValueError, 'approximated_heads must be "all", a sequence or a mapping'),
        (lambda t: hybridize(t, {"x": [0]}), ValueError, "approximated_heads must name layers among .* got 'x'"),
        (lambda t: hybridize(t, [4], max_length=8), ValueError, "approximated_heads must be at most 3, got 4"),
        (lambda t: hybridize(t), ValueError, "max_length must be given where heads are approximated"),
        (lambda t: train_selector(t, t, []), ValueError, "a layer of student must have a .selector to train, got none"),
        (
            lambda t: train_approximator(t, student_of(t, approximate_output=False), []),
            ValueError,
            "a layer of student must have a .approximator to train",
        ),
        (
            lambda t: train_selector(t, Teacher(((4, 4),)), []),
            ValueError,
            "student must have the teacher's attention layers blocks.0.attention, blocks.1.attention, got blocks.0",
        ),
        (
            lambda t: train_selector(t, student_of(t), batches(1), progress=3),
            TypeError,
            "progress must be True, False, None or a function, got 3",
        ),
        (
            lambda t: train_selector(t, student_of(t, max_length=8), batches(1)),
            ValueError,
            "at most max_length = 8, got 24",
        ),
    ],
)  # fmt: skip
def test_errors(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(Teacher())


@pytest.mark.parametrize("train", [train_selector, train_approximator])
def test_an_interrupted_training_leaves_modes_gradients_and_the_teacher(train):
    teacher, student = Teacher(), student_of(Teacher())
    for parameter in student.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    teacher.blocks[0].eval()
    modes = [m.training for model in (teacher, student) for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in teacher.modules()]
    before = copy.deepcopy(teacher.state_dict())

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(teacher, student, batches(2), progress=stop)
    assert [m.training for model in (teacher, student) for m in model.modules()] == modes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in teacher.modules()] == hooks
    assert all(torch.equal(teacher.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(bool((parameter.grad == 3).all()) for parameter in student.parameters())
