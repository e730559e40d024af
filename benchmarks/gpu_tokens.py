"""The GPU benchmarks of the variable-width embedding and of its loss, on ids by Zipf's law."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_attn
from benchmarks.gpu_timing import Contender, Device, assert_near, compare, wings_of

OUTPUT = {torch.bfloat16: 2**-6, torch.float32: 1e-4}


@dataclass
class Model:
    """Bands in order of rank: token i is of rank i."""

    ids: Tensor  # [N]
    sizes: tuple[int, ...]
    dim: int
    leaves: tuple[
        Tensor, ...
    ]  # tables, then the projections of all bands but the first, whose width is `dim`
    token_band: Tensor  # int32 [V]
    token_row: Tensor  # int32 [V]

    @property
    def case(self) -> str:
        widths = "/".join(str(t.shape[1]) for t in self.leaves[: len(self.sizes)])
        dtype = str(self.leaves[0].dtype).removeprefix("torch.")
        return f"V{sum(self.sizes)} D{self.dim} widths {widths} N{len(self.ids)} {dtype}"

    def bands(self, leaves: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        count = len(self.sizes)
        return leaves[:count], (None, *leaves[count:])

    def table(self, leaves: tuple[Tensor, ...]) -> Tensor:
        """The dense table [V, D]."""
        tables, projections = self.bands(leaves)
        return torch.cat([t if p is None else t @ p.t() for t, p in zip(tables, projections, strict=True)])


def model(device: Device, tokens: int, dtype: torch.dtype) -> Model:
    sizes, widths, dim = (2000, 8000, 40257), (512, 128, 32), 512
    if device.dry:
        sizes, widths, dim, tokens = (6, 10, 24), (16, 8, 4), 16, 24
    generator = torch.Generator(device.name).manual_seed(0)
    draw = partial(torch.randn, device=device.name, generator=generator)
    vocabulary = sum(sizes)
    weights = 1 / (torch.arange(vocabulary, device=device.name) + 2.7)
    ids = torch.multinomial(weights, tokens, replacement=True, generator=generator)
    tables = [draw(n, w).to(dtype) for n, w in zip(sizes, widths, strict=True)]
    projections = [(draw(dim, w) / w**0.5).to(dtype) for w in widths[1:]]
    count = torch.tensor(sizes, device=device.name)
    band = torch.repeat_interleave(torch.arange(3, device=device.name), count, output_size=vocabulary)
    row = torch.arange(vocabulary, device=device.name) - (count.cumsum(0) - count)[band]
    return Model(ids, sizes, dim, (*tables, *projections), band.int(), row.int())


def eager(m: Model, *leaves: Tensor) -> Tensor:
    """Adaptive input as fairseq and others write it: mask, lookup, projection and assignment per band."""
    out, low = leaves[0].new_zeros(len(m.ids), m.dim), 0
    for table, projection in zip(*m.bands(leaves), strict=True):
        inside = (m.ids >= low) & (m.ids < low + len(table))
        rows = F.embedding(m.ids[inside] - low, table)
        out[inside] = rows if projection is None else F.linear(rows, projection)
        low += len(table)
    return out


def all_bands(m: Model, *leaves: Tensor) -> Tensor:
    """The same without sizes that depend on the ids, so that it compiles to one graph."""
    out, low = leaves[0].new_zeros(len(m.ids), m.dim), 0
    for table, projection in zip(*m.bands(leaves), strict=True):
        inside = (m.ids >= low) & (m.ids < low + len(table))
        rows = F.embedding((m.ids - low).clamp(0, len(table) - 1), table)
        rows = rows if projection is None else F.linear(rows, projection)
        out = torch.where(inside.unsqueeze(1), rows, out)
        low += len(table)
    return out


def check_embedding(m: Model, dense: bool, forward: Callable[..., Tensor]) -> None:
    """Output and gradients against the dense table in float64."""
    leaves = (m.table(m.leaves),) if dense else m.leaves
    narrow = [t.detach().requires_grad_() for t in leaves]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    out = forward(*narrow)
    want = F.embedding(m.ids, wide[0] if dense else m.table(tuple(wide)))
    grad = torch.randn(want.shape, device=want.device).to(out.dtype)
    tolerance = OUTPUT[out.dtype]
    assert_near("output", out, want, tolerance)
    pairs = zip(
        torch.autograd.grad(out, narrow, grad), torch.autograd.grad(want, wide, grad.double()), strict=True
    )
    for ours, true in pairs:
        assert_near("gradient", ours, true, 2 * tolerance)


def embedding(device: Device) -> Iterator[dict]:
    for dtype in (torch.bfloat16, torch.float32):
        m = model(device, 16384, dtype)

        def ours(*leaves, wing, m=m):
            return sparse_attn.variable_width_embedding(
                m.ids, *m.bands(leaves), m.token_band, m.token_row, backend=wing
            )

        def compiled(m=m):
            backend = "eager" if device.dry else "inductor"
            return torch.compile(partial(all_bands, m), fullgraph=True, dynamic=False, backend=backend)

        check = partial(check_embedding, m, False)
        contenders = {
            **{
                name: Contender(lambda ours=ours, wing=wing: partial(ours, wing=wing), m.leaves, check)
                for name, wing in wings_of("variable_width_embedding", device).items()
            },
            "nn_embedding_dense": Contender(
                lambda m=m: partial(F.embedding, m.ids),
                (m.table(m.leaves),),
                partial(check_embedding, m, True),
            ),
            "eager_adaptive_input": Contender(lambda m=m: partial(eager, m), m.leaves, check),
            "compiled_bands": Contender(compiled, m.leaves, check),
        }
        # The least that must move: each distinct row once, the ids, and the output.
        distinct = m.ids.unique()
        widths = torch.tensor([t.shape[1] for t in m.leaves[:3]], device=device.name)
        rows = int(widths[m.token_band[distinct].long()].sum())
        least = (rows + len(m.ids) * m.dim) * dtype.itemsize + m.ids.nbytes
        for row in compare("embedding", m.case, contenders, device, ("forward", "both")):
            if row["direction"] == "forward" and row.get("ms"):
                row["gigabytes_per_s"] = least / row["ms"] / 1e6
            yield row


def check_loss(m: Model, hidden: Tensor, forward: Callable[..., Tensor]) -> None:
    """Loss and the gradient of the hidden states against the dense head in float64."""
    leaf, wide = hidden.detach().requires_grad_(), hidden.detach().double().requires_grad_()
    loss = forward(leaf, *m.leaves)
    table = m.table(tuple(t.double() for t in m.leaves))
    want = F.cross_entropy(wide @ table.t(), m.ids)
    tolerance = OUTPUT[hidden.dtype]
    assert_near("loss", loss, want, tolerance)
    ours, true = torch.autograd.grad(loss, leaf)[0], torch.autograd.grad(want, wide)[0]
    assert_near("gradient of hidden", ours, true, 2 * tolerance)


def liger() -> Callable[..., Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, table, ids: loss(table, hidden, ids)


def _with_ids(function: Callable[..., Tensor], m: Model, hidden: Tensor, table: Tensor) -> Tensor:
    return function(hidden, table, m.ids)


def loss(device: Device) -> Iterator[dict]:
    for dtype in (torch.bfloat16, torch.float32):
        m = model(device, 4096, dtype)
        hidden = (torch.randn(len(m.ids), m.dim, device=device.name) / m.dim**0.5).to(dtype)
        table = m.table(m.leaves)

        def ours(hidden, *leaves, m=m):
            return sparse_attn.variable_width_cross_entropy(
                hidden, m.ids, *m.bands(leaves), m.token_band, m.token_row, backend="triton"
            )

        def dense(hidden, table, m=m):
            return F.cross_entropy(F.linear(hidden, table).float(), m.ids)

        def fused(m=m):
            return partial(_with_ids, F.linear_cross_entropy, m)  # torch has it from 2.13 on

        def of_liger(m=m):
            return partial(_with_ids, liger(), m)

        def check_dense(forward, m=m, hidden=hidden, table=table):
            check_loss(m, hidden, lambda h, *_: forward(h, table))

        check = partial(check_loss, m, hidden)
        contenders = {"ours": Contender(lambda ours=ours: ours, (hidden, *m.leaves), check)}
        rivals = {"dense": lambda dense=dense: dense, "linear_cross_entropy": fused, "liger": of_liger}
        if not device.dry:
            rivals["dense_compiled"] = lambda dense=dense: torch.compile(dense, dynamic=False)
        for name, make in rivals.items():
            contenders[name] = Contender(make, (hidden, table), check_dense)
        yield from compare("loss", m.case, contenders, device, ("forward", "both"))
