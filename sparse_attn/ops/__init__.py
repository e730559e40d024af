"""The ops, one file each: the public function and the one declaration of schema, fake, gradient and refusals.

Names are those of the files: `from sparse_attn.ops.topk_select import topk_select`.
"""

# The wings must stand before the ops, which define one overload per wing.
from sparse_attn import wings  # noqa: F401
