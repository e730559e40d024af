"""What happens to the others where a rank raises, or dies."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=20)


def run(rank: int, folder: str, how: str) -> None:
    """Two ranks; the second leaves before its second call. The first writes what it is told."""
    from sparse_attn.distributed import Layout, context_parallel_attention

    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=TIMEOUT)
    query = torch.randn(1, 2, 8, 4)
    layout = Layout.even(16, 2)
    context_parallel_attention(query, query, query, 2, layout=layout)
    if rank == 1:
        if how == "dies":
            os._exit(3)
        if how == "raises":
            context_parallel_attention(query[:, :, 1:], query, query, 2, layout=layout)
    try:
        context_parallel_attention(query, query, query, 2, layout=layout)
    except RuntimeError as error:
        Path(folder, "told").write_text(str(error))
        raise
