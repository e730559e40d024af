"""The tests in `interpreted` mean something only where Triton interprets."""

from sparse_attn.wings import triton as triton_wing

collect_ignore = [] if triton_wing.interpreted else ["interpreted"]
