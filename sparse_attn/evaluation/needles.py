"""Needles: numbers told once in a long text and asked for at its end, each answer read off in one forward."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sparse_attn.evaluation.likelihood import predictions

WORDS = (
    "apple",
    "bridge",
    "candle",
    "desert",
    "engine",
    "forest",
    "guitar",
    "hammer",
    "island",
    "jungle",
    "kettle",
    "ladder",
    "mirror",
    "needle",
    "orange",
    "pencil",
    "quarry",
    "river",
    "saddle",
    "tunnel",
    "violin",
    "window",
    "yellow",
    "zipper",
    "anchor",
    "button",
    "copper",
    "dragon",
)


class Case(NamedTuple):
    """A text with questions and their answers behind it."""

    tokens: Tensor  # int64 [T + 1]
    answers: list[slice]  # places of each answer's tokens
    depths: list[float]  # where in the text its needle stands: 0 is its beginning
    needles: int


class Answer(NamedTuple):
    """What a model says where an answer belongs, its earlier tokens given."""

    right: bool  # each of its tokens is the likeliest
    nats: float  # the negative log-probability of the whole of it


def case(
    encode: Callable[[str], list[int]], filler: Sequence[int], length: int, depths: Sequence[float], seed: int
) -> Case:
    """Needles at some depths of a filler text, `length` tokens in all, then the questions in random order.

    Args:
        encode: text → token ids, without any that mark a beginning or an end.
        filler: token ids of a text, at least `length`.
        length: of the whole.
        depths: one needle each, between 0 and 1.
        seed: of the words, the numbers and the order.

    Raises:
        ValueError: needles and questions leave no room for the text, or the filler is too short.
    """
    draw = random.Random(seed)
    words = draw.sample(WORDS, len(depths))
    numbers = [str(draw.randint(10_000, 99_999)) for _ in depths]
    told = [encode(f" The secret number of the {w} is {n}. ") for w, n in zip(words, numbers, strict=True)]
    asked, answers, order = [], [], list(range(len(depths)))
    draw.shuffle(order)
    for i in order:
        asked += encode(f"\nThe secret number of the {words[i]} is")
        answer = encode(f" {numbers[i]}")
        answers.append((len(asked), len(asked) + len(answer)))
        asked += [*answer, *encode(".")]
    room = length + 1 - len(asked) - sum(map(len, told))
    if room < len(depths) or len(filler) < room:
        raise ValueError(
            f"length must leave room for {len(depths)} needles and be no longer than the text, got {length} with "
            f"{len(filler)} tokens of text"
        )
    tokens: list[int] = []
    done = 0
    for i in sorted(order, key=lambda i: depths[i]):
        place = min(room, int(room * depths[i]))
        tokens += [*filler[done:place], *told[i]]
        done = place
    tokens += filler[done:room]
    shift = len(tokens)
    places = [slice(shift + a, shift + b) for a, b in answers]
    return Case(torch.tensor(tokens + asked), places, [depths[i] for i in order], len(depths))


def answered(model: torch.nn.Module, case: Case) -> list[Answer]:
    """What the model makes of each answer, in one forward over the whole."""
    last = len(case.tokens) - case.answers[0].start
    said = predictions(model, case.tokens, last)
    logits = torch.cat([part for part, _ in said.parts()])
    right = logits.argmax(-1) == said.targets
    nats = cross_entropy(logits, said.targets, reduction="none").double()
    shift = len(case.tokens) - last
    places = [slice(a.start - shift, a.stop - shift) for a in case.answers]
    return [Answer(bool(right[p].all()), float(nats[p].sum())) for p in places]
