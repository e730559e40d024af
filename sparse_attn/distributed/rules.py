"""DTensor in, DTensor out: the calls of this package on sharded tensors, forward and backward.

The first tensor says how the work is split: replicated, by batch, by heads (of queries and keys together), or by
positions; the others are brought to it. The work is the function itself on local tensors, between `to_local` and
`from_local`, so gradients, wings and `torch.compile` are those of one process.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from sparse_attn.distributed import context, vocabulary
from sparse_attn.distributed.layout import Layout
from sparse_attn.ops.shards import Shardable
from sparse_attn.rule import Rule

_RULE = {
    "attn_mask": "BHTS",
    "key_lengths": "B",
    "key_starts": "BT",
    "causal_offset": "BT",
    "sink_logits": "H",
}
WHOLE = "R"  # the letter of a mesh dimension over which nothing is split


def _product(sizes: Sequence[int]) -> int:
    product = 1  # math.prod is not for a compiler that looks at sizes
    for size in sizes:
        product *= size
    return product


class Split:
    """What each dimension of the mesh splits: a letter."""

    def __init__(self, mesh: DeviceMesh, letters: Sequence[str]) -> None:
        self.mesh, self.letters = mesh, tuple(letters)

    def ways(self, letter: str) -> int:
        """Over how many ranks that axis is split."""
        return _product([self.mesh.size(m) for m, own in enumerate(self.letters) if own == letter])

    def placements(self, axes: str, shape: Sequence[int], broadcast: str = "") -> tuple[Placement, ...]:
        """Of a tensor with these axes; those in `broadcast` may have size 1, and are whole then."""

        def of(letter: str) -> Placement:
            at = axes.find(letter)
            if (
                letter == "T" and at < 0
            ):  # keys lie where queries do, until they are gathered; tiles of queries do
                at = max(axes.find("S"), axes.find("N"))
            if at < 0 or (letter in broadcast and shape[at] == 1):
                return Replicate()
            return Shard(at)

        return tuple(of(letter) for letter in self.letters)

    def gradients(self, placements: Sequence[Placement]) -> tuple[Placement, ...]:
        """What is whole while the work is split gets a gradient from each part."""
        return tuple(
            Partial() if own != WHOLE and not isinstance(p, Shard) else p
            for own, p in zip(self.letters, placements, strict=True)
        )

    def local(self, tensor: Tensor, axes: str, broadcast: str = "") -> Tensor:
        """This rank's part."""
        if not isinstance(tensor, DTensor):  # the same on every rank
            whole = [Replicate()] * self.mesh.ndim
            tensor = DTensor.from_local(tensor, self.mesh, whole, run_check=False)
        wanted = self.placements(axes, tensor.shape, broadcast)
        if tensor.placements != wanted:
            tensor = tensor.redistribute(placements=wanted)
        return tensor.to_local(grad_placements=self.gradients(wanted))

    def whole(self, result: Tensor, axes: str, sizes: dict[str, int]) -> DTensor:
        """The DTensor of which `result` is this rank's part; `sizes` are global ones that are known."""
        letters = axes.replace("G", "H")
        shape = [
            sizes.get(letter, n) if letter != "H" else n * self.ways("H")
            for letter, n in zip(letters, result.shape, strict=True)
        ]
        placements = self.placements(letters, shape)
        strides = [_product(shape[i + 1 :]) for i in range(len(shape))]
        return DTensor.from_local(
            result.contiguous(),
            self.mesh,
            placements,
            run_check=False,
            shape=torch.Size(shape),
            stride=tuple(strides),
        )


def on_dtensors(call: Shardable, positional: tuple, options: dict[str, Any]) -> Any:
    """`call` with arguments among which there are DTensors."""
    arguments = dict(inspect.signature(call.function).bind(*positional, **options).arguments)
    if "tables" in call.axes:
        return vocabulary.on_dtensors(call, arguments)
    name, axes = next((n, a) for n, a in call.axes.items() if a)
    lead = arguments[name]
    for other, letters in call.axes.items():
        value = arguments.get(other)
        plain = isinstance(value, Tensor) and not isinstance(value, DTensor)
        if plain and letters not in ("B", "B*") and "mask" not in other:
            assert isinstance(value, Tensor)
            raise TypeError(
                f"{other} must be a DTensor, as other arguments are, got a plain tensor of shape "
                f"{list(value.shape)}: DTensor.from_local(…, [Replicate()]) where it is the same on every rank"
            )
    if arguments.get("block_table") is not None:
        raise NotImplementedError("pages (block_table) are not split over ranks: call it on local tensors")
    if arguments.get("key_index") is not None:
        raise ValueError("key_index is of one process's keys: leave it out of a call with DTensors")
    split = Split(lead.device_mesh, [_letter(name, p, axes, lead) for p in lead.placements])
    _divisible(call, arguments, split)
    sizes = {letter: lead.shape[i] for i, letter in enumerate(axes) if letter in "BT"}
    local = _local(call, arguments, split)
    if "T" in split.letters:
        keys = next(arguments[n].shape[a.index("S")] for n, a in call.axes.items() if "S" in a)
        return _over_positions(call, local, split, sizes, keys)
    found = call.function(**local)
    if call.results == ("mean",):
        # The mean of the parts' means, each by what it is of: a sum that is still to be made.
        part = next(iter(local.values())).shape[0] / max(1, sizes["B"]) / split.ways("H")
        summed = [Replicate() if own == WHOLE else Partial() for own in split.letters]
        return DTensor.from_local(found * part, split.mesh, summed, run_check=False)
    return _wrapped(call, found, split, sizes, arguments)


def _wrapped(
    call: Shardable, found: Any, split: Split, sizes: dict[str, int], options: dict[str, Any]
) -> Any:
    results = found if isinstance(found, tuple) else (found,)
    letters = call.results
    if len(results) < len(letters):  # which of them were asked for
        letters = tuple(
            a
            for a in letters
            if a == letters[0] or options.get("return_indices" if "G" in a else "return_lse")
        )
    wrapped = tuple(split.whole(r, axes, sizes) for r, axes in zip(results, letters, strict=True))
    return wrapped if isinstance(found, tuple) else wrapped[0]


def _over_positions(call: Shardable, local: dict, split: Split, sizes: dict[str, int], keys: int) -> Any:
    if split.letters.count("T") > 1:
        raise ValueError("positions may be split over one dimension of the mesh, got several")
    at = split.letters.index("T")
    ranks = split.mesh.size(at)
    layouts = Layout.even(sizes["T"], ranks), Layout.even(keys, ranks)
    found = context.over_positions(call, local, *layouts, split.mesh.get_group(at))
    sizes = {**sizes, "N": -(-sizes["T"] // context.tile_of(call, local))}
    return _wrapped(call, found, split, sizes, local)


def _letter(name: str, placement: Placement, axes: str, lead: Tensor) -> str:
    if isinstance(placement, (Replicate, Partial)):
        return WHOLE
    if type(placement) is not Shard:
        raise ValueError(f"{name} has the placement {placement}, which sparse_attn has no rule for")
    letter = axes[placement.dim % lead.dim()]
    if letter not in "BHT":
        raise ValueError(
            f"{name} must be whole in dimension {placement.dim} {'(the last)' if letter == 'D' else ''}, got "
            f"{placement}: split the batch, the heads or the positions"
        )
    return letter


def _divisible(call: Shardable, arguments: dict[str, Any], split: Split) -> None:
    """Heads are split evenly, those of queries and of keys together, and not where they share one selection."""
    ways = split.ways("H")
    if ways == 1:
        return
    for name, axes in call.axes.items():
        value, at = arguments.get(name), axes.find("H")
        if isinstance(value, Tensor) and at >= 0 and value.dim() > at and value.shape[at] % ways:
            if name == "attn_mask" and value.shape[at] == 1:
                continue
            raise ValueError(
                f"{name} has {value.shape[at]} heads, which the mesh would split {ways} ways: they must be a multiple"
            )
    rule = arguments.get("rule")
    share = arguments.get("share") if rule is None else rule.share
    if share == "all" and "weights" not in call.axes:
        raise ValueError(
            "share='all' is one selection of all heads, and the mesh splits the heads: "
            "the selector sparse_attn.distributed.AcrossRanks, on local tensors, sums over the ranks"
        )


def _local(call: Shardable, arguments: dict[str, Any], split: Split) -> dict[str, Any]:
    found = dict(arguments)
    for name, value in arguments.items():
        axes = call.axes.get(name)
        if isinstance(value, Rule):
            found[name] = _local_rule(value, split)
        elif name == "among" and value is not None:
            found[name] = value._replace(blocks=split.local(value.blocks, "BHNM", "H"))
        elif isinstance(value, Tensor) and axes is not None:
            if axes == "B*":
                axes = "BT"[: value.dim()]
            found[name] = split.local(value, axes.replace("G", "H"), "BHTS" if "mask" in name else _one(axes))
    return found


def _one(axes: str) -> str:
    return "H" if "G" in axes else ""


def _local_rule(rule: Rule, split: Split) -> Rule:
    parts: dict[str, Any] = {}
    for name, axes in _RULE.items():
        value = getattr(rule, name)
        if isinstance(value, Tensor):
            axes = axes[-value.dim() :] if name == "attn_mask" else axes[: value.dim()]
            parts[name] = split.local(value, axes, "BHTS" if name == "attn_mask" else "")
    return replace(rule, **parts) if parts else rule
