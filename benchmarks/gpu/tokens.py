"""The GPU benchmarks of the variable-width embedding and of its loss, on ids by Zipf's law."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_attn
from benchmarks.gpu.timing import Contender, Device, compare, wings_of
from sparse_attn.bench.bands import Bands, all_bands, by_zipf, eager
from sparse_attn.bench.cases.variable_width_embedding import check_lookup
from sparse_attn.bench.correctness import assert_near
from sparse_attn.bench.registry import Work

OUTPUT = {torch.bfloat16: 2**-6, torch.float32: 1e-4}


def model(device: Device, tokens: int, dtype: torch.dtype) -> Bands:
    if device.dry:
        return by_zipf(24, (6, 10, 24), (16, 8, 4), dtype, device.name)
    return by_zipf(tokens, dtype=dtype, device=device.name)


def described(m: Bands) -> str:
    widths = "/".join(str(t.shape[1]) for t in m.tables)
    dtype = str(m.tables[0].dtype).removeprefix("torch.")
    return f"V{sum(m.sizes)} D{m.dim} widths {widths} N{len(m.ids)} {dtype}"


def check_embedding(m: Bands, dense: bool, forward: Callable[..., Tensor]) -> None:
    """Output and gradients against the dense table in float64."""
    leaves = (m.dense(m.leaves),) if dense else m.leaves
    check_lookup("it", m, Work(forward, leaves), dense, 2 * OUTPUT[leaves[0].dtype])


def embedding(device: Device) -> Iterator[dict]:
    for dtype in (torch.bfloat16, torch.float32):
        m = model(device, 16384, dtype)

        def ours(*leaves, wing, m=m):
            return sparse_attn.variable_width_embedding(
                m.ids, *m.split(leaves), m.token_band, m.token_row, backend=wing
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
                (m.dense(m.leaves),),
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
        for row in compare("embedding", described(m), contenders, device, ("forward", "both")):
            if row["direction"] == "forward" and row.get("ms"):
                row["gigabytes_per_s"] = least / row["ms"] / 1e6
            yield row


def check_loss(m: Bands, hidden: Tensor, forward: Callable[..., Tensor]) -> None:
    """Loss and the gradient of the hidden states against the dense head in float64."""
    leaf, wide = hidden.detach().requires_grad_(), hidden.detach().double().requires_grad_()
    loss = forward(leaf, *m.leaves)
    table = m.dense(tuple(t.double() for t in m.leaves))
    want = F.cross_entropy(wide @ table.t(), m.ids)
    tolerance = OUTPUT[hidden.dtype]
    assert_near("loss", loss, want, tolerance)
    ours, true = torch.autograd.grad(loss, leaf)[0], torch.autograd.grad(want, wide)[0]
    assert_near("gradient of hidden", ours, true, 2 * tolerance)


def liger() -> Callable[..., Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, table, ids: loss(table, hidden, ids)


def _with_ids(function: Callable[..., Tensor], m: Bands, hidden: Tensor, table: Tensor) -> Tensor:
    return function(hidden, table, m.ids)


def loss(device: Device) -> Iterator[dict]:
    for dtype in (torch.bfloat16, torch.float32):
        m = model(device, 4096, dtype)
        hidden = (torch.randn(len(m.ids), m.dim, device=device.name) / m.dim**0.5).to(dtype)
        table = m.dense(m.leaves)

        def ours(hidden, *leaves, m=m):
            return sparse_attn.variable_width_cross_entropy(
                hidden, m.ids, *m.split(leaves), m.token_band, m.token_row, backend="triton"
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
        yield from compare("loss", described(m), contenders, device, ("forward", "both"))
