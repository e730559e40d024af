"""What a case is: plain values that say everything about one call, so that its number, or its text, runs it again."""

from __future__ import annotations

import importlib
import math
import random
import zlib
from collections.abc import Callable
from typing import Any

import torch
from helpers.guarded import guarded
from helpers.inputs import LAYOUTS
from torch import Tensor
from torch.utils._pytree import tree_leaves

import sparse_attn

Case = dict[str, Any]

FILES = ("attention", "packed", "pages", "blocks", "indexers", "embeddings", "losses", "plans", "raw")
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# Whole numbers make every score exact, so that ties are real; the special values stand among whole numbers.
EXACT = ("integers", "equal", "zeros")
SPECIAL = ("nan", "inf")  # exact scores, too, but not finite
EXTREME = ("huge", "denormal")  # overflow and underflow as they like: the contract alone is checked
KINDS = ("normal", *EXACT, *SPECIAL, *EXTREME)
# Most calls are small: faults show there, and many fit into a second. This share is large enough for several threads.
LARGE = 0.03


class Draw(random.Random):
    """Choices of one case."""

    large = False  # whether it is a case for several threads

    def size(self, largest: int, smallest: int = 0) -> int:
        """Small mostly, and often what a vector or a tile holds, one more, or one less."""
        if self.random() < 0.6:
            return self.randint(smallest, max(smallest, min(largest, 9)))
        edges = [n + d for n in (8, 16, 32, 64, 128, 256) for d in (-1, 0, 1)]
        return self.choice([n for n in edges if smallest <= n <= largest] or [largest])

    def maybe(self, chance: float, value: Callable[[], Any], other: Any = None) -> Any:
        return value() if self.random() < chance else other


class Fuzzed:
    """An op under test. `draw` says what the call is, `check` makes it and raises AssertionError where it is wrong."""

    name: str
    weight = 3  # how many of the cases it gets, beside the others
    wings: tuple[str, ...] = ("cpu", "reference")
    dtypes: tuple[str, ...] = tuple(DTYPES)

    def draw(self, draw: Draw) -> Case:
        raise NotImplementedError

    def check(self, case: Case) -> None:
        raise NotImplementedError


OPS: dict[str, Fuzzed] = {}


def fuzzed(kind: type[Fuzzed]) -> type[Fuzzed]:
    OPS[kind.name] = kind()
    return kind


def load() -> dict[str, Fuzzed]:
    for name in FILES:
        importlib.import_module(f"fuzz.{name}")
    return OPS


def draw_case(seed: int, number: int, ops: list[str], large: float = LARGE) -> Case:
    """Case `number` of a run; `large` is the share of the large ones."""
    draw = Draw(f"{seed}:{number}")
    draw.large = draw.random() < large
    op = OPS[draw.choices(ops, [OPS[name].weight for name in ops])[0]]
    wing = op.wings[0] if draw.random() < 0.75 else op.wings[-1]
    dtypes = [d for d in op.dtypes if wing != "cpu" or d != "float64"]
    case = {
        "op": op.name,
        "wing": wing,
        "dtype": draw.choice(dtypes),
        "seed": draw.randrange(2**31),
        "threads": draw.choice((2, 3, 4) if draw.large else (1, 1, 1, 2)),
        "again": draw.random() < (0.5 if draw.large else 0.15),
    }
    return case | op.draw(draw)


def check_case(case: Case) -> None:
    torch.set_num_threads(case["threads"])
    OPS[case["op"]].check(case)


# ---- tensors --------------------------------------------------------------------------------------------------


def generator(case: Case, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{case['seed']} {name}".encode()))


def whole(case: Case, name: str, *shape: int, low: int = -3, high: int = 3) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=generator(case, name))


def numbers(case: Case, name: str, kind: str, *shape: int) -> Tensor:
    """float32 (the case's dtype is the caller's), of one of KINDS."""
    if kind in ("normal", "huge", "denormal"):
        values = torch.randn(shape, generator=generator(case, name))
        half = case["dtype"] == "float16"
        sizes = {"normal": 1.0, "huge": 3e4 if half else 1e19, "denormal": 1e-7 if half else 1e-40}
        return values * sizes[kind]
    if kind == "zeros":
        return torch.zeros(shape) * whole(case, name, *shape).float()  # −0 among them
    values = whole(case, name, *shape).float()
    if kind == "equal" and values.dim() > 1 and values.numel():
        values = values[..., :1, :].expand(shape).clone()
    if kind in SPECIAL and values.numel():
        places = torch.randint(
            values.numel(), (1 + values.numel() // 40,), generator=generator(case, "places")
        )
        found = torch.tensor([math.nan] if kind == "nan" else [math.inf, -math.inf])
        values.view(-1)[places] = found[places % len(found)]
    return values


def _odd_offset(tensor: Tensor) -> Tensor:
    storage = torch.full((tensor.numel() + 3,), math.nan if tensor.is_floating_point() else 77).to(
        tensor.dtype
    )
    return storage[3:].view(tensor.shape).copy_(tensor)


def _expanded(dim: int) -> Callable[[Tensor], Tensor]:
    return lambda t: t.narrow(dim, 0, 1).expand(t.shape) if t.numel() else t


def _guarded(at_end: bool) -> Callable[[Tensor], Tensor]:
    return lambda t: guarded(t, at_end) if t.numel() else t


VIEWS: dict[str, Callable[[Tensor], Tensor]] = LAYOUTS | {
    "odd_offset": _odd_offset,
    "one_batch": _expanded(0),
    "one_head": _expanded(1),
    "one_position": _expanded(2),
    "one_component": _expanded(3),
    "before_protected_page": _guarded(True),
    "after_protected_page": _guarded(False),
}


def draw_view(draw: Draw) -> str:
    return draw.maybe(0.5, lambda: draw.choice(list(VIEWS)), "contiguous")


def tensor(case: Case, name: str, *shape: int) -> Tensor:
    """The case's tensor of that name, of its kind and in its layout; 4 dimensions."""
    values = numbers(case, name, case[f"{name}_values"], *shape).to(DTYPES[case["dtype"]])
    return VIEWS[case[f"{name}_view"]](values)


def draw_kinds(draw: Draw, *names: str) -> Case:
    """Values and layouts of tensors: most calls with ordinary numbers, or with exact ones, everywhere."""
    kind = draw.choice(("normal", "normal", "integers", "special"))
    kinds = {n: draw.choice(KINDS) if kind == "special" else kind for n in names}
    return {f"{n}_values": kinds[n] for n in names} | {f"{n}_view": draw_view(draw) for n in names}


def among(case: Case, kinds: tuple[str, ...], *names: str) -> bool:
    return any(case[f"{n}_values"] in kinds for n in names)


def is_exact(case: Case, *names: str) -> bool:
    return all(case[f"{n}_values"] in EXACT + SPECIAL for n in names)


# ---- calls ----------------------------------------------------------------------------------------------------


def bits(tensor: Tensor) -> Tensor:
    """Comparable with torch.equal, NaN or not."""
    if tensor.is_sparse:
        return torch.cat((tensor._indices().flatten(), bits(tensor._values()).flatten().long()))
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(sizes[tensor.element_size()])


# Takes the place of every call where it is set (the soak makes them its own way).
instead: Callable[..., Any] | None = None


def call(case: Case, function: Callable, *arguments: Any, **options: Any) -> Any:
    """What the function returns; where the case says so it is called again, with other threads, for the same bits.

    Inputs must not have changed.
    """
    if instead is not None:
        return instead(function, *arguments, **options)
    if not case["again"]:
        return function(*arguments, **options)
    given = [t for t in tree_leaves((arguments, options)) if isinstance(t, Tensor)]
    before = [bits(t).clone() for t in given]
    result = function(*arguments, **options)
    # Plain PyTorch's own products may depend on the number of threads.
    torch.set_num_threads(1 + case["threads"] % 2 if case["wing"] == "cpu" else case["threads"])
    second = function(*arguments, **options)
    torch.set_num_threads(case["threads"])
    for one, other in zip(tree_leaves(result), tree_leaves(second), strict=True):
        if isinstance(one, Tensor):
            assert torch.equal(bits(one), bits(other)), "a second call gives other bits"
    for one, other in zip(given, before, strict=True):
        assert torch.equal(bits(one), other), "an input has changed"
    return result


def run(case: Case, op: str, *arguments: Any, **options: Any) -> Any:
    """`sparse_attn.<op>` on the case's wing."""
    return call(case, getattr(sparse_attn, op), *arguments, backend=case["wing"], **options)
