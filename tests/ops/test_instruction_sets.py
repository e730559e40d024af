"""The CPU wing on each instruction set below this machine's best: the same tests, in a process that is capped to it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_attn.wings import extension

FILES = (
    "test_topk_select.py",
    "test_topk_select_long.py",
    "test_decoding.py",
    "test_key_index.py",
    "test_select_by_bounds.py",
    "test_indexer_select.py",
    "test_quantized_select.py",
    "test_block_attention.py",
    "test_refine_blocks.py",
    "test_gathered_attention.py",
    "test_topk_attention.py",
    "test_special_values.py",
    "test_softcap_and_sinks.py",
    "test_error_budget.py",
    "test_tail.py",
    "test_variable_width_embedding.py",
    "test_variable_width_embedding_errors.py",
    "test_variable_width_cross_entropy.py",
)
# What differs from the sets that are tested beside it: avx512 lacks products of bfloat16 alone, generic code has the
# half types as float32 with a conversion before and after it.
WORDS = {"avx512": "bfloat16", "generic": "(not float16 or error_budget or special_values)"}
# What torch makes of an op, whose kernels it does not see.
SAME = "opcheck", "compile", "autocast", "refused", "vmap", "second_order"
# The kernels that a CPU with AMX has of its own; all others are this set's.
FEWER = {
    "avx512_bf16": (
        "test_topk_select.py",
        "test_select_by_bounds.py",
        "test_topk_attention.py",
        "test_variable_width_cross_entropy.py",
    )
}
BUILT = () if extension.module is None else tuple(extension.module.build_info()["isas"])


def lower_than_this_machines() -> tuple[str, ...]:
    return BUILT[: BUILT.index(extension.module.cpu_isa())] if BUILT else ()


@pytest.mark.slow
@pytest.mark.skipif(extension.load_error is not None, reason=str(extension.load_error))
@pytest.mark.parametrize("isa", lower_than_this_machines())
def test_the_ops_pass_their_tests(isa):
    here = Path(__file__).parent
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-k",
            f"cpu and {WORDS.get(isa, 'cpu')} and not ({' or '.join(SAME)})",
            "-p",
            "no:cacheprovider",
            *(here / f for f in FEWER.get(isa, FILES)),
        ],
        env={**os.environ, "SPARSE_ATTN_CPU_ISA": isa},
        cwd=here.parent.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, f"{isa}:\n{run.stdout[-4000:]}\n{run.stderr[-2000:]}"
    assert " passed" in run.stdout


@pytest.mark.skipif(extension.load_error is not None, reason=str(extension.load_error))
def test_an_unknown_instruction_set_is_refused():
    code = "from sparse_attn.wings import extension; extension.module.cpu_isa()"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "SPARSE_ATTN_CPU_ISA": "avx1024"},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert f"SPARSE_ATTN_CPU_ISA must be one of {', '.join(BUILT)}, got avx1024" in run.stderr


@pytest.mark.skipif(extension.load_error is not None, reason=str(extension.load_error))
def test_the_cap_is_obeyed():
    """Up to what the machine has, which a process without a cap says: this one may have been started with one."""
    best = BUILT.index(isa_of_a_process(None))
    for number in {0, best - 1, len(BUILT) - 1} - {-1}:  # each costs a process
        assert isa_of_a_process(BUILT[number]) == BUILT[min(number, best)]


def isa_of_a_process(cap: str | None) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "SPARSE_ATTN_CPU_ISA"}
    code = "from sparse_attn.wings import extension; print(extension.module.cpu_isa())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | ({"SPARSE_ATTN_CPU_ISA": cap} if cap else {}),
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.strip()
