"""Internal op: fills an index buffer with one value, −1 before a selection writes the slots that it keeps.

There is a CUDA kernel alone: the CPU kernels write every slot themselves, and in plain PyTorch it is `fill_`.
"""

from sparse_attn.ops.registry import library

library.define("fill_indices.cuda(Tensor(a!) indices, int value) -> ()")
