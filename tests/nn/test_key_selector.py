"""`nn.KeySelector`: its logits, the contract of its indices, its loss, what it cannot learn, arguments."""

import copy

import pytest
import torch
from helpers import compare, oracle

import sparse_attn
from sparse_attn.nn import KeySelector

B, H, T, D, LONGEST = 2, 3, 33, 8, 40


def make(wing=None, **options) -> KeySelector:
    torch.manual_seed(1)
    settings = {"num_heads": H, "hidden": 16} | options
    return KeySelector(D, LONGEST, 5, **settings).to(wing.device if wing else "cpu")


def queries(*shape, device="cpu", dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*(shape or (B, H, T, D)), device=device, dtype=dtype)


def by_hand(selector: KeySelector, query: torch.Tensor) -> torch.Tensor:
    """The formula head by head, without a mask (0 after the query if relative): [B, H, T, max_length]."""
    heads = []
    for h in range(query.shape[1]):
        inner, positions = selector.inner, selector.positions
        features = torch.nn.functional.gelu(query[:, h] @ inner.weight[h] + inner.bias[h])
        heads.append(features @ positions.weight[h] + positions.bias[h])
    logits = torch.stack(heads, dim=1)
    if not selector.relative:
        return logits
    moved = torch.zeros_like(logits)
    for i in range(query.shape[2]):
        moved[:, :, i, : i + 1] = logits[:, :, i, : i + 1].flip(-1)  # of distances i … 0
    return moved


def assert_selects(indices, logits, top_k, **options):
    """The contract and the scores: a query and keys whose products are the logits."""
    keys = torch.eye(logits.shape[3], dtype=logits.dtype).expand(*logits.shape[:2], -1, -1)
    compare.assert_well_formed(indices, logits, keys, top_k, **options)
    want = oracle.topk_select(logits, keys, top_k, scale=1.0, **options)
    chosen = compare.is_chosen(indices, logits.shape[3])
    differs = chosen != compare.is_chosen(want, logits.shape[3])
    # Two ways to add up one logit may order near ties differently.
    threshold = logits.gather(-1, want.long().clamp(min=0)).masked_fill(want < 0, float("inf")).amin(-1, True)
    assert not bool((differs & ((logits - threshold).abs() > 1e-5)).any())


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("length", [0, 1, 7])
def test_logits_follow_the_formula_and_hide_the_future(batch, length):
    selector, query = make().double(), queries(batch, H, length, D, dtype=torch.float64)
    hidden = torch.arange(LONGEST) > torch.arange(length).unsqueeze(1)
    logits, want = selector(query), by_hand(selector, query)
    torch.testing.assert_close(logits, want.masked_fill(hidden, -torch.inf))
    torch.testing.assert_close(selector(query, is_causal=False), want)
    selector.relative = True
    want = by_hand(selector, query)
    torch.testing.assert_close(selector(query), want.masked_fill(hidden, -torch.inf))


@pytest.mark.parametrize("relative", [False, True])
def test_a_block_of_queries_is_a_block_of_the_whole(relative):
    selector, query = make(relative=relative), queries()
    torch.testing.assert_close(selector(query[:, :, 10:20], causal_offset=10), selector(query)[:, :, 10:20])


@pytest.mark.parametrize("top_k", [1, 5, T, 10 * T, None])
@pytest.mark.parametrize(("is_causal", "relative"), [(True, False), (False, False), (True, True)])
def test_select_keeps_the_largest_logits(wing, top_k, is_causal, relative):
    selector, query = make(wing, relative=relative), queries(device=wing.device)
    indices = selector.select(query, top_k, is_causal=is_causal, backend=wing.name)
    logits = by_hand(selector, query)[..., :T].detach().cpu()
    assert_selects(indices.cpu(), logits, top_k or 5, is_causal=is_causal)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("length", [0, 1, 2])
def test_select_of_few_queries(wing, length, relative):
    indices = make(wing, relative=relative).select(
        queries(B, H, length, D, device=wing.device), backend=wing.name
    )
    assert indices.shape == (B, H, length, min(5, length))
    if length:
        assert indices[:, :, 0].eq(torch.tensor([0, -1][:length], device=wing.device)).all()


@pytest.mark.parametrize("relative", [False, True])
def test_select_for_the_last_queries_of_a_longer_sequence(wing, relative):
    selector, query = make(wing, relative=relative), queries(device=wing.device)
    whole = selector.select(query, backend=wing.name)
    last = selector.select(query[:, :, 20:], causal_offset=20, key_length=T, backend=wing.name)
    assert torch.equal(last, whole[:, :, 20:])


@pytest.mark.parametrize("relative", [False, True])
def test_select_is_causal(wing, relative):
    selector, query = make(wing, relative=relative), queries(device=wing.device)
    changed = query.clone()
    changed[:, :, 20:] += 1.0
    before, after = selector.select(query), selector.select(changed)
    assert torch.equal(before[:, :, :20], after[:, :, :20])
    assert not torch.equal(before[:, :, 20:], after[:, :, 20:])


def test_select_ties_and_nan(wing):
    """Equal logits: the smallest positions. NaN in one query: legal indices there, the others as before."""
    selector, query = make(wing), queries(device=wing.device)
    before = selector.select(query, backend=wing.name)
    query[0, 1, 30] = torch.nan
    after = selector.select(query, backend=wing.name)
    others = torch.ones(B, H, T, dtype=torch.bool)
    others[0, 1, 30] = False
    assert torch.equal(after[others], before[others])
    compare.assert_well_formed(after.cpu(), query.cpu(), query.cpu(), 5, is_causal=True)
    torch.nn.init.zeros_(selector.positions.weight)
    torch.nn.init.zeros_(selector.positions.bias)
    tied = selector.select(queries(device=wing.device), backend=wing.name)
    assert tied[:, :, 10].eq(torch.arange(5, device=wing.device)).all()
    selector.relative = True
    tied = selector.select(queries(device=wing.device), backend=wing.name)
    assert tied[:, :, 10].eq(torch.arange(6, 11, device=wing.device)).all()


def test_select_feeds_gathered_attention(wing):
    selector = make(wing)
    query, key, value = (queries(device=wing.device) for _ in range(3))
    few = sparse_attn.gathered_attention(query, key, value, selector.select(query))
    everything = sparse_attn.gathered_attention(query, key, value, selector.select(query, T))
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(everything, dense, rtol=1e-4, atol=1e-5)
    assert (few - dense).abs().max() > 1e-2


@pytest.mark.parametrize("hidden", [1, 64, 300])
def test_any_hidden_width(wing, hidden):
    selector = make(wing, hidden=hidden)
    query = queries(device=wing.device)
    logits = by_hand(selector, query)[..., :T].detach().cpu()
    assert_selects(selector.select(query).cpu(), logits, 5, is_causal=True)


@pytest.mark.parametrize("is_causal", [True, False])
def test_loss_is_the_divergence_from_the_teachers_row(is_causal):
    selector, query = make().double(), queries(dtype=torch.float64)
    scores = torch.randn(B, H, T, T, dtype=torch.float64)
    hidden = torch.triu(torch.ones(T, T, dtype=torch.bool), 1) & is_causal
    teacher = torch.distributions.Categorical(logits=scores.masked_fill(hidden, -1e30))
    student = torch.distributions.Categorical(
        logits=by_hand(selector, query)[..., :T].masked_fill(hidden, -1e30)
    )
    want = torch.distributions.kl_divergence(teacher, student).mean()
    for target, from_scores in ((scores, True), (3 * teacher.probs, False)):
        loss = selector.loss(query, target, from_scores=from_scores, is_causal=is_causal)
        torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("relative", [False, True])
def test_loss_of_blocks_adds_up_to_that_of_the_whole(relative):
    selector, query, scores = make(relative=relative), queries(), torch.randn(B, H, T, T)
    whole = selector.loss(query, scores, from_scores=True)
    parts = [
        selector.loss(query[:, :, i:j], scores[:, :, i:j], from_scores=True, causal_offset=i) * (j - i)
        for i, j in ((0, 10), (10, T))
    ]
    torch.testing.assert_close(sum(parts) / T, whole)


def test_loss_without_mass_is_zero():
    selector, query = make(), queries()
    loss = selector.loss(query, torch.zeros(B, H, T, T))
    loss.backward()
    assert loss == 0
    assert all(p.grad.isfinite().all() for p in selector.parameters())
    assert selector.loss(query[:, :, :0], torch.zeros(B, H, 0, T)) == 0


@pytest.mark.parametrize("relative", [False, True])
def test_loss_ignores_what_a_query_may_not_see(relative):
    selector, query, scores = make(relative=relative), queries(), torch.randn(B, H, T, T)
    changed = scores + torch.triu(torch.full((T, T), 50.0), 1)
    assert torch.equal(
        selector.loss(query, scores, from_scores=True), selector.loss(query, changed, from_scores=True)
    )


def test_gradients_reach_every_parameter():
    selector = make()
    selector.loss(queries(), torch.randn(B, H, T, LONGEST), from_scores=True, is_causal=False).backward()
    for name, parameter in selector.named_parameters():
        assert parameter.grad.isfinite().all(), name
        # Every head and every output of it has a gradient of its own.
        assert (parameter.grad.flatten(1).abs().amax(1) > 0).all(), name


def fit(selector: KeySelector, query, scores, steps: int) -> list[float]:
    optimizer = torch.optim.Adam(selector.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = selector.loss(query, scores, from_scores=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.torch_defaults
def test_it_learns_positions_that_the_query_tells():
    """Queries that name a position: training must find it, and the loss fall to next to nothing."""
    wanted = torch.randint(LONGEST, (B, H, T)) % (torch.arange(T) + 1)
    codes = torch.randn(LONGEST, D)
    scores = torch.nn.functional.one_hot(wanted, T) * 12.0
    selector = make(hidden=64)
    losses = fit(selector, codes[wanted], scores, 300)
    assert losses[-1] < 0.05 * losses[0]
    hits = (selector.select(codes[wanted], 1)[..., 0] == wanted).float().mean()
    assert hits > 0.97


@pytest.mark.torch_defaults
def test_relative_learns_distances_and_holds_them_elsewhere():
    """Queries that name one of four distances, trained on early queries: right at later ones too."""
    distance = torch.randint(4, (B, H, T))
    wanted = (torch.arange(T) - distance).clamp(min=0)
    codes, scores = torch.randn(4, D)[distance], torch.nn.functional.one_hot(wanted, T) * 12.0
    selector = make(hidden=64, relative=True)
    losses = fit(selector, codes[:, :, :20], scores[:, :, :20], 300)
    assert losses[-1] < 0.05 * losses[0]
    hits = (selector.select(codes, 1)[..., 0] == wanted)[:, :, 20:].float().mean()
    assert hits > 0.97


@pytest.mark.torch_defaults
def test_it_cannot_learn_what_the_keys_hold():
    """One query, two texts whose best keys differ: the best guess is half and half, a divergence of ln 2."""
    query = queries(1, H, 1, D).expand(2, H, T, D)
    best = torch.zeros(2, H, T, T)
    best[0, ..., 3], best[1, ..., 7] = 40.0, 40.0
    rows = slice(10, T)  # these queries see both
    selector = make(hidden=64)
    optimizer = torch.optim.Adam(selector.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        loss = selector.loss(query[:, :, rows], best[:, :, rows], from_scores=True, causal_offset=10)
        loss.backward()
        optimizer.step()
    assert loss.item() == pytest.approx(torch.tensor(2.0).log().item(), abs=0.01)


def test_state_copy_and_repr():
    selector = copy.deepcopy(make())
    assert sorted(selector.state_dict()) == [
        "inner.bias",
        "inner.weight",
        "positions.bias",
        "positions.weight",
    ]
    for part in ("head_dim=8", "max_length=40", "top_k=5", "num_heads=3", "hidden=16", "relative=False"):
        assert part in repr(selector)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_and_autocast(dtype):
    selector, query = make(), queries()
    with torch.autocast("cpu", dtype):
        mixed, loss = selector.select(query), selector.loss(query, torch.rand(B, H, T, T))
    half = make(dtype=dtype).select(query.to(dtype))
    for indices in (mixed, half):
        compare.assert_well_formed(indices, query, query, 5, is_causal=True)
    assert loss.dtype == torch.float32


@pytest.mark.torch_defaults
@pytest.mark.parametrize("relative", [False, True])
def test_select_and_loss_compile_in_one_graph(relative):
    selector, query, scores = make(relative=relative), queries(), torch.rand(B, H, T, T)
    select = torch.compile(selector.select, fullgraph=True, backend="aot_eager")
    assert torch.equal(select(query), selector.select(query))
    loss = torch.compile(selector.loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(loss(query, scores), selector.loss(query, scores))


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"head_dim": 0}, ValueError, "head_dim must be at least 1, got 0"),
        ({"max_length": 4.0}, TypeError, "max_length must be an int, got 4.0"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"num_heads": None}, TypeError, "num_heads must be an int, got None"),
        ({"hidden": 0}, ValueError, "hidden must be at least 1, got 0"),
        ({"relative": 1}, TypeError, "relative must be True or False, got 1"),
    ],
)
def test_bad_arguments(options, error, sentence):
    with pytest.raises(error, match=sentence):
        KeySelector(**({"head_dim": 8, "max_length": 40, "top_k": 4, "num_heads": 2} | options))


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda s: s(None), TypeError, r"query must be a tensor of shape \[B, 3, T, 8\], got None"),
        (lambda s: s(queries(B, 2, T, D)), ValueError, r"query must have shape \[B, 3, T, 8\], got .*2, 33, 8"),
        (lambda s: s(queries(B, H, T, D + 1)), ValueError, r"query must have shape \[B, 3, T, 8\]"),
        (lambda s: s(queries().double()), TypeError, "dtype torch.float32, got a float64 tensor"),
        (lambda s: s(queries(), is_causal=1), TypeError, "is_causal must be True or False, got 1"),
        (lambda s: s(queries(), is_causal=False, causal_offset=1), ValueError, "causal_offset needs is_causal"),
        (lambda s: s.select(queries(1, H, 41, D)), ValueError, "key_length must be at most max_length = 40, got 41"),
        (lambda s: s.select(queries(), 0), ValueError, "top_k must be at least 1, got 0"),
        (lambda s: s.select(queries(), key_length=40), ValueError, "is_causal with 33 queries and 40 keys needs"),
        (lambda s: s.loss(queries(), queries()[:, :, 1:]), ValueError, r"target must have shape .* \[2, 3, 33, Tk\]"),
        (
            lambda s: s.loss(queries(), torch.zeros(B, H, T, 41)),
            ValueError,
            "target's last dimension must be at most max_length = 40, got 41",
        ),
    ],
)  # fmt: skip
def test_bad_input(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(make())


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda s: s(queries(), is_causal=False), "relative=True needs is_causal=True, got is_causal=False"),
        (lambda s: s.select(queries(), is_causal=False), "relative=True needs is_causal=True"),
        (
            lambda s: s(queries(), causal_offset=8),
            "causal_offset \\+ T must be at most max_length = 40, got 41",
        ),
        (
            lambda s: s.select(queries(), causal_offset=3, key_length=35),
            "causal_offset \\+ T must be at most key_length = 35, got 3 \\+ 33",
        ),
    ],
)
def test_bad_input_of_relative(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(make(relative=True))
