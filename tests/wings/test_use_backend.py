"""`use_backend` and `explain_call`: of one thread, ended in any order, seen by autograd and by compiled graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from helpers.inputs import qkv

import sparse_attn
from sparse_attn import use_backend
from sparse_attn.wings import base

Q, K, V = qkv(1, 2, 2, 4, 4, 8)


def running() -> str:
    """The wing that a call of this thread runs on."""
    return sparse_attn.explain(Q, K, V, 2).backend


DEFAULT = running()


def in_thread(work: Callable[[], object]) -> object:
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture(autouse=True)
def _nothing_stays_set():
    yield
    assert running() == DEFAULT
    assert base._here.thread.plain


def test_blocks_nest_and_end():
    with use_backend("reference"):
        if not base.wings()[0].refusal("topk_attention", torch.device("cpu"), torch.float32, {}):
            with use_backend("cpu"):
                assert running() == "cpu"
        assert running() == "reference"
        with use_backend(None):
            assert running() == DEFAULT
        assert running() == "reference"
        with pytest.raises(KeyboardInterrupt), use_backend(None):
            raise KeyboardInterrupt
        assert running() == "reference"
        with pytest.raises(ValueError), use_backend("typo"):
            pass
        assert running() == "reference"


def test_other_threads_are_not_affected():
    with use_backend("reference"):
        assert in_thread(running) == DEFAULT
    entered, looked = threading.Event(), threading.Event()

    def work():
        with use_backend("reference"):
            entered.set()
            looked.wait()
            return running()

    thread_found = []
    thread = threading.Thread(target=lambda: thread_found.append(work()))
    thread.start()
    entered.wait()
    assert running() == DEFAULT
    looked.set()
    thread.join()
    assert thread_found == ["reference"]


def test_two_threads_leave_in_the_order_in_which_they_came():
    first_in, second_in, first_out = (threading.Event() for _ in range(3))
    found = []

    def first():
        with use_backend("reference"):
            first_in.set()
            second_in.wait()
        first_out.set()

    def second():
        first_in.wait()
        with use_backend("reference"):
            second_in.set()
            first_out.wait()
            found.append(running())
        found.append(running())

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["reference", DEFAULT]


def test_blocks_of_one_thread_end_in_any_order():
    outer, inner = use_backend("reference"), use_backend(None)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    with use_backend("reference"):
        assert running() == "reference"
    assert running() == DEFAULT  # of the inner block
    inner.__exit__(None, None, None)


def test_a_generator_that_another_thread_closes_ends_its_block():
    def generator():
        with use_backend("reference"):
            yield

    blocks = generator()
    next(blocks)
    assert running() == "reference"
    with use_backend(None):
        assert in_thread(lambda: (blocks.close(), running())[1]) == DEFAULT
        assert running() == DEFAULT
    assert running() == DEFAULT


class _Nested(torch.autograd.Function):
    """Backward within backward; deep inside torch goes on in a thread of its own, as it does for each GPU."""

    @staticmethod
    def forward(ctx, x, depth, main, look):
        ctx.depth, ctx.main, ctx.look = depth, main, look
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if threading.get_ident() == ctx.main:
            assert ctx.depth < 200, "torch went on in no other thread"
            with torch.enable_grad():
                x = torch.ones(1, requires_grad=True)
                _Nested.apply(x, ctx.depth + 1, ctx.main, ctx.look).backward()
        else:
            ctx.look()
        return grad, None, None, None


def test_autograds_threads_see_the_block_that_backward_is_called_in():
    """As far as torch hands them the caller's context, which it does from 2.13 on."""
    found: list[tuple[bool, str]] = []

    def look():
        found.append((torch._C._is_key_in_tls("context"), running()))

    def backward():
        x = torch.ones(1, requires_grad=True)
        _Nested.apply(x, 0, threading.get_ident(), look).backward()

    with use_backend("reference"):
        backward()
    backward()
    handed_on = found[0][0]
    assert handed_on or torch.__version__ < (2, 13)
    assert [wing for _, wing in found] == ["reference" if handed_on else DEFAULT, DEFAULT]


def test_a_recomputation_takes_the_wing_of_its_block():
    query = Q.clone().requires_grad_()
    seen = []

    def attention(query):
        seen.append(running())
        return sparse_attn.topk_attention(query, K, V, 2)

    with use_backend("reference"):
        out = torch.utils.checkpoint.checkpoint(attention, query, use_reentrant=False)
        out.sum().backward()
    assert seen == ["reference", "reference"]


@pytest.mark.parametrize("within", [False, True], ids=["around the graph", "in the graph"])
def test_a_compiled_graph_follows_the_block(within):
    """It is compiled anew in a block, and the first graph serves again after it, in every thread."""
    graphs = []

    def count(graph, inputs):
        graphs.append(
            [str(n.target).split(".")[-1] for n in graph.graph.nodes if "sparse_attn" in str(n.target)]
        )
        return graph

    def attention(query):
        if not within:
            return sparse_attn.topk_attention(query, K, V, 2)
        with use_backend("reference"):
            out = sparse_attn.topk_attention(query, K, V, 2)
        return out + sparse_attn.topk_attention(query, K, V, 2)

    torch.compiler.reset()
    compiled = torch.compile(attention, backend=count, fullgraph=True)
    inner = ["reference"] if within else []
    default, forced = [*inner, DEFAULT], [*inner, "reference"]
    compiled(Q)
    assert graphs == [default]
    with use_backend("reference"):
        compiled(Q)
        assert graphs == [default, forced]
        in_thread(lambda: compiled(Q))
        assert graphs == [default, forced]
    compiled(Q)
    assert graphs == [default, forced]
    with pytest.raises(ValueError, match="cannot run"), use_backend("cuda"):
        sparse_attn.topk_attention(Q, K, V, 2)
    compiled(Q)
    assert graphs == [default, forced]
    assert running() == DEFAULT


def test_explaining_nests_and_ends():
    ran = []

    def twice(query):
        ran.append(sparse_attn.explain_call(sparse_attn.topk_select, query, K, 2).op)
        ran.append(in_thread(lambda: sparse_attn.topk_select(query, K, 2).shape[-1]))  # of this thread alone
        with use_backend("reference"):
            pass
        sparse_attn.topk_attention(query, K, V, 2)
        ran.append("the op that was to be explained")

    assert sparse_attn.explain_call(twice, Q).op == "topk_attention"
    assert ran == ["topk_select", 2]
    with pytest.raises(KeyboardInterrupt):
        sparse_attn.explain_call(_interrupted)
    assert sparse_attn.topk_attention(Q, K, V, 2).shape == Q.shape
    with use_backend("reference"):
        assert sparse_attn.explain(Q, K, V, 2).backend == "reference"
        assert running() == "reference"


def _interrupted():
    raise KeyboardInterrupt


def test_explaining_a_call_that_handles_its_errors():
    def careful(query):
        try:
            return sparse_attn.topk_attention(query, K, V, 2)
        except Exception:
            return sparse_attn.topk_select(query, K, 2)

    assert sparse_attn.explain_call(careful, Q).op == "topk_attention"
    assert sparse_attn.explain_call(torch.compile(careful, backend="eager"), Q).op == "topk_attention"
