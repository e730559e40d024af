"""The harness on a small random model: what it reports, against plain PyTorch; what it does not run twice."""

from __future__ import annotations

import inspect
import itertools
import json
import math
import random

import pytest
import torch
from torch.nn import functional as F

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import sparse_attn.integrations.transformers as sparse_transformers  # noqa: E402
from sparse_attn.evaluation import (  # noqa: E402
    Document,
    Plan,
    Store,
    compared,
    draw,
    evaluate_model,
    interval,
    likelihood,
    tables,
)
from sparse_attn.evaluation import needles as needle_task  # noqa: E402
from sparse_attn.evaluation.harness import DEPTHS, SEVERAL  # noqa: E402
from sparse_attn.evaluation.recall import QUERIES, REUSED, found_share, recalls  # noqa: E402
from sparse_attn.integrations.indexers import attention_layers  # noqa: E402
from sparse_attn.integrations.watching import watching  # noqa: E402
from sparse_attn.selection import Selection  # noqa: E402

VOCABULARY, LENGTH = 97, 240


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


def documents(count: int = 3) -> list[Document]:
    generator = torch.Generator().manual_seed(1)
    return [
        Document(f"{i}.txt", torch.randint(VOCABULARY, (LENGTH + 1,), generator=generator))
        for i in range(count)
    ]


def letters(text: str) -> list[int]:
    return [ord(c) % VOCABULARY for c in text]


def encode(text: str) -> list[int]:
    return [sum(letters(word)) % VOCABULARY for word in text.split()]


def test_text_is_what_plain_pytorch_says(model, tmp_path):
    selectors = ["exact/kv+tail", "exact+blocks", "window", "exact/reuse2", "exact/kv/reuse3+blocks"]
    plan = Plan(selectors, ["10%"], [LENGTH], ["text"])
    store = Store(tmp_path / "results.json", {"model": "m"})
    sparse_transformers.configure(
        model, top_k=7, sinks=2
    )  # dense attention is meant to be dense all the same
    before = dict(vars(model.config))
    evaluate_model(model, documents(), plan, store)
    assert vars(model.config) == before
    model.set_attn_implementation("sdpa")
    tokens = documents()[1].tokens
    half, targets = LENGTH // 2, tokens[LENGTH // 2 + 1 :]

    def log_probabilities():
        with torch.no_grad():
            return model(tokens[None, :-1]).logits[0, half:].double().log_softmax(-1)

    dense = log_probabilities()
    (row,) = store.find(task="text", arm="dense", document="1.txt")
    assert row["nats"] == pytest.approx(float(F.nll_loss(dense, targets)), abs=1e-5)
    for name, options in (
        ("exact/kv+tail", {"share": "kv", "residual": True}),
        ("exact+tail", {"residual": True}),
        ("exact+blocks", {"residual": "blocks"}),
        ("window", {"window": 20, "sinks": 4}),
        ("exact", {}),
        ("exact/reuse2", {"reuse": 2}),
        ("exact/kv/reuse3+blocks", {"share": "kv", "reuse": 3, "residual": "blocks"}),
    ):
        sparse_transformers.configure(model, top_k=24, **options)
        sparse = log_probabilities()
        (row,) = store.find(task="text", arm=name, document="1.txt")
        assert row["keys"] == 24
        assert row["nats"] == pytest.approx(float(F.nll_loss(sparse, targets)), abs=1e-5)
        assert row["kl"] == pytest.approx(float((dense.exp() * (dense - sparse)).sum(-1).mean()), rel=1e-3)
        assert row["kl"] > 1e-4
        assert row["same"] == pytest.approx(float((dense.argmax(-1) == sparse.argmax(-1)).double().mean()))


def test_all_keys_lose_nothing(model, tmp_path):
    plan = Plan(["hierarchical", "blocks", "exact/all"], ["239"], [LENGTH], ["text", "recall"])
    store = Store(tmp_path / "results.json", {})
    evaluate_model(model, documents(1), plan, store)
    for c in compared(store, LENGTH):
        assert abs(c.over.mean) < 1e-4
        assert c.kl.mean < 1e-5
    for row in store.find(task="recall"):
        # The blocks of 239 keys are 4 of 64: all there are of 240. Only the very last query sees more than 239.
        assert row["recall"] > 0.999
        assert row["mass"] > 0.999


def test_what_is_there_is_not_run_again(model, tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    plan = Plan(["exact"], ["5%"], [LENGTH], documents=2, cases=1)
    steps = []
    evaluate_model(
        model, documents(), plan, Store(file, {}), encode=encode, progress=lambda *s: steps.append(s)
    )
    cases = len(DEPTHS) + 1
    assert len(steps) == 2 * 2 + 1 + 2 * cases
    before = json.loads(file.read_text())
    again = Store(file, {})
    evaluate_model(model, documents(), plan, again, encode=encode, progress=lambda *s: steps.append(s))
    assert len(steps) == 2 * 2 + 1 + 2 * cases
    assert again.rows == before["rows"]
    # One row is lost: it alone is made again, the same.
    lost = next(r for r in again.rows if r["task"] == "text" and r["arm"] == "exact")
    again.rows.remove(lost)
    evaluate_model(model, documents(), plan, again, encode=encode, progress=lambda *s: steps.append(s))
    assert len(steps) == 2 * 2 + 1 + 2 * cases + 1
    assert again.rows[-1] == lost
    with pytest.raises(ValueError, match="choose another file"):
        Store(file, {"model": "another"})


def test_tables_and_picture(model, tmp_path):
    store = Store(tmp_path / "results.json", {})
    plan = Plan(["window"], ["5%", "20%"], [LENGTH], documents=3, cases=1)
    evaluate_model(model, documents(), plan, store, encode=encode)
    text, recall, needles = tables(store)
    assert text.rows[0][:2] == ["dense", "all"]
    assert [row[:2] for row in text.rows[1:]] == [
        ["exact (oracle)", "12 (5.0%)"],
        ["window", "12 (5.0%)"],
        ["exact (oracle)", "48 (20.0%)"],
        ["window", "48 (20.0%)"],
    ]
    assert all("±" in row[2] for row in text.rows)
    exact = next(row for row in recall.rows if row[0] == "exact (oracle)")
    assert exact[2] == "100.0%"
    assert len(needles.columns) == 2 + len(DEPTHS) + 2
    assert needles.rows[0][:2] == ["dense", "all"]
    assert [row[0] for row in needles.rows[1:]] == ["exact (oracle)", "window"] * 2
    # Of what the rows hold: the text's mean over its answers, minus dense attention's on the same text.
    rows = {(r["arm"], r["keys"], r["case"]): r for r in store.find(task="needles")}
    mean = {key: sum(r["nats"]) / len(r["nats"]) for key, r in rows.items()}
    cases = range(len(DEPTHS) + 1)
    differences = [mean["window", 12, n] - mean["dense", None, n] for n in cases]
    shown = next(row for row in needles.rows if row[:2] == ["window", "12 (5.0%)"])[-1]
    assert shown == str(interval(differences))
    assert "±" in shown
    for row in store.find(task="needles"):  # as an earlier version wrote them
        del row["nats"]
    assert {row[-1] for row in tables(store)[2].rows} == {""}
    draw(store, tmp_path / "picture.png", "title")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def same_rows(ours, theirs, rel):
    """The same texts, and numbers to rounding."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name, value in b.items():
            close = isinstance(value, float)
            assert a[name] == (pytest.approx(value, rel=rel, abs=1e-2 * rel) if close else value), (name, b)


@pytest.mark.parametrize("kind", ["Gemma2", "Cohere", "GPT2"])
def test_hidden_states_in_the_place_of_logits(kind, tmp_path, monkeypatch):
    """Of long texts and large vocabularies: the same numbers, with the head's soft caps, scales and layouts."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {
        "Gemma2": lambda: transformers.Gemma2Config(
            vocab_size=VOCABULARY, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5, **shape
        ),
        "Cohere": lambda: transformers.CohereConfig(vocab_size=VOCABULARY, logit_scale=0.3, **shape),
        "GPT2": lambda: transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
        ),
    }[kind]()
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    plan = Plan(["exact"], ["10%"], [LENGTH], ["text"])
    whole = Store(tmp_path / "whole.json", {})
    evaluate_model(model, documents(), plan, whole)
    forwards = []
    head = likelihood._head
    monkeypatch.setattr(likelihood, "_head", lambda *given: forwards.append(given) or head(*given))
    monkeypatch.setattr(likelihood, "_KEPT", 1000)
    monkeypatch.setattr(likelihood, "_AT_ONCE", 50 * VOCABULARY)
    parts = Store(tmp_path / "parts.json", {})
    evaluate_model(model, documents(), plan, parts)
    # Of each of three documents two forwards, each with a test, and 120 rows in three, of dense attention twice.
    assert len(forwards) == 3 * (1 + 3 + 1 + 6)
    same_rows(parts.rows, whole.rows, 1e-4)


def test_the_last_tokens(model, tmp_path):
    """What goes before them is their context all the same."""
    store = Store(tmp_path / "results.json", {})
    plan = Plan(["exact"], ["10%"], [LENGTH], ["text"], last=30)
    evaluate_model(model, documents(), plan, store)
    tokens = documents()[0].tokens
    with torch.no_grad():
        logs = model(tokens[None, :-1]).logits[0, -30:].double().log_softmax(-1)
    row = store.find(arm="dense", document="0.txt")[0]
    assert row["nats"] == pytest.approx(float(F.nll_loss(logs, tokens[-30:])), abs=1e-5)
    assert tables(store)[0].title.startswith("Text, the last 30 of 240 tokens")
    evaluate_model(model, documents(), plan, store)
    assert len(store.rows) == 6
    with pytest.raises(
        ValueError, match=r"has results of the last 30 tokens of each document, and .* the last half"
    ):
        evaluate_model(model, documents(), Plan(["exact"], ["10%"], [LENGTH], ["text"]), store)
    with pytest.raises(ValueError, match="last must be at most each of lengths, got 300 of 240 tokens"):
        Plan(lengths=[LENGTH], last=300)


def test_a_head_that_wants_more_than_hidden_states(model, tmp_path, monkeypatch):
    plan = Plan(["exact"], ["10%"], [LENGTH], ["text"])
    whole, parts = (Store(tmp_path / f"{n}.json", {}) for n in ("whole", "parts"))
    forward = model.forward

    def wants(*given, **named):
        """Its logits depend on how many tokens it was given."""
        out = forward(*given, **named)
        out.logits = out.logits * len(named["input_ids"][0])
        return out

    wants.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(model, "forward", wants)
    evaluate_model(model, documents(1), plan, whole)
    monkeypatch.setattr(likelihood, "_KEPT", 1000)
    evaluate_model(model, documents(1), plan, parts)
    assert parts.rows == whole.rows


def test_dense_attention_of_this_package(tmp_path):
    """For sliding windows: what scaled_dot_product_attention says, without a mask of all pairs."""
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=30,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )
    model = transformers.Gemma3ForCausalLM(config).eval()
    found = {}
    for dense in (None, "sparse_attn"):
        store = Store(tmp_path / f"{dense}.json", {})
        plan = Plan(
            ["exact/kv", "exact+blocks", "window"], ["20%"], [LENGTH], ["text", "recall"], dense=dense
        )
        evaluate_model(model, documents(), plan, store)
        assert model.config._attn_implementation == "sdpa"
        found[dense] = store.rows
    same_rows(found["sparse_attn"], found[None], 1e-3)
    with pytest.raises(TypeError, match="dense must be the name of an attention"):
        Plan(dense=3)


def test_recall_counts(model):
    """Against a matrix of all scores."""
    tokens = documents(1)[0].tokens[:-1]
    arms = Plan(["window", "exact/all", "exact/reuse2"], ["24"], [LENGTH], ["recall"]).pairs(LENGTH)
    found = {f.arm: f for f in recalls(model, tokens, arms)}
    assert found["exact"].recall == 1.0
    layers = []

    def look(given):
        scores = given.query @ given.key.repeat_interleave(2, 1).mT * given.scale
        seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        mass = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        places = torch.arange(LENGTH)
        window = seen & ((places > places[:, None] - 20) | (places < 4))
        best = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, mass.topk(24).indices, True) & seen
        hit = float((best & window).sum()) / float(best.sum())
        layers.append((hit, float((mass * window).sum(-1).mean()), best))

    assert QUERIES >= LENGTH
    with watching(model, look, attention_layers(model).values()) as run:
        run(tokens[None])
    hits, masses, bests = zip(*layers, strict=True)
    assert found["window"].recall == pytest.approx(sum(hits) / 3, abs=1e-3)
    assert found["window"].mass == pytest.approx(sum(masses) / 3, abs=1e-5)
    assert found["window"].least_mass == pytest.approx(min(masses), abs=1e-5)
    reused = [float((a & b).sum()) / float(b.sum()) for a, b in itertools.pairwise(bests)]
    assert found[REUSED].recall == pytest.approx(sum(reused) / 2, abs=1e-3)
    assert found["window"].recall < found["exact/all"].recall < 1
    # Of three layers the second attends to what the first chose, and the third chooses for itself.
    assert found["exact/reuse2"].recall == pytest.approx((2 + reused[0]) / 3, abs=1e-3)


def test_blocks_are_counted_by_their_tokens():
    chosen = Selection(
        torch.tensor([[[[0, 2], [0, -1]]]], dtype=torch.int32), 4, 2
    )  # two tiles of two queries
    exact = torch.tensor([[[[0, 5], [8, 9], [1, 8], [3, -1]]]], dtype=torch.int32)
    assert found_share(chosen, exact, 12) == 5 / 7


class TestNeedles:
    def test_a_case_holds_what_it_asks_for(self):
        filler = list(range(40, 90)) * 20
        case = needle_task.case(letters, filler, 600, SEVERAL, seed=3)
        assert len(case.tokens) == 601
        text = case.tokens.tolist()
        for answer, depth in zip(case.answers, case.depths, strict=True):
            number = text[answer]
            assert len(number) == 6  # a space and five digits
            told = next(i for i in range(len(text)) if text[i : i + 6] == number)
            assert told < answer.start
            assert abs(told / 600 - depth) < 0.35
        assert len(case.answers) == len(SEVERAL)
        assert case.tokens.tolist() == needle_task.case(letters, filler, 600, SEVERAL, seed=3).tokens.tolist()

    def test_answers_are_read_off(self):
        """A model that knows the text to the last token, and one that errs in one answer."""
        filler = [random.Random(i).randint(0, 96) for i in range(600)]
        case = needle_task.case(letters, filler, 500, (0.2, 0.6), seed=0)

        class Knows(torch.nn.Module):
            wrong: int | None = None

            def __init__(self):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.zeros(1))

            def forward(self, input_ids, use_cache):
                logits = F.one_hot(case.tokens[1:], VOCABULARY).float()[None]
                if self.wrong is not None:
                    logits[0, self.wrong - 1] = 0
                    logits[0, self.wrong - 1, (case.tokens[self.wrong] + 1) % VOCABULARY] = 1
                return type("Output", (), {"logits": logits})

        def right(model):
            return [answer.right for answer in needle_task.answered(model, case)]

        knows = Knows()
        assert right(knows) == [True, True]
        length = case.answers[0].stop - case.answers[0].start
        sure = -math.log(math.e / (math.e + VOCABULARY - 1))  # of one token, whose logit is 1 among zeros
        assert [a.nats for a in needle_task.answered(knows, case)] == pytest.approx([length * sure] * 2)
        knows.wrong = case.answers[1].start
        assert right(knows) == [True, False]
        assert needle_task.answered(knows, case)[1].nats == pytest.approx(length * sure + 1)
        knows.wrong = case.answers[0].stop - 1
        assert right(knows) == [False, True]

    def test_what_a_model_says_of_answers(self, model, tmp_path):
        """Rows of the store against a forward of plain PyTorch; more cases leave those that are there."""
        store = Store(tmp_path / "results.json", {})
        plan = Plan(["exact/kv"], ["10%"], [LENGTH], ["needles"], cases=1)
        evaluate_model(model, documents(), plan, store, encode=encode)
        before = list(store.rows)
        evaluate_model(
            model,
            documents(),
            Plan(plan.selectors, plan.budgets, [LENGTH], ["needles"], cases=2),
            store,
            encode=encode,
        )
        assert store.rows[: len(before)] == before
        assert len(store.rows) == 2 * len(before)
        number = len(DEPTHS)  # the text with several
        filler = documents()[number % 3].tokens.tolist()
        case = needle_task.case(encode, filler, LENGTH, SEVERAL, seed=number)
        for name, use in (
            ("dense", lambda: model.set_attn_implementation("sdpa")),
            ("exact/kv", lambda: sparse_transformers.configure(model, top_k=24, share="kv")),
        ):
            use()
            with torch.no_grad():
                logs = model(case.tokens[None, :-1]).logits[0].double().log_softmax(-1)
            (row,) = store.find(case=number, arm=name)
            targets = case.tokens[1:]
            said = -logs.gather(1, targets[:, None])[:, 0]
            assert row["nats"] == pytest.approx(
                [float(said[a.start - 1 : a.stop - 1].sum()) for a in case.answers], abs=1e-4
            )
            right = logs.argmax(-1) == targets
            assert row["right"] == [bool(right[a.start - 1 : a.stop - 1].all()) for a in case.answers]
            assert row["depths"] == case.depths

    def test_no_room(self):
        with pytest.raises(ValueError, match="leave room for 6 needles"):
            needle_task.case(letters, [1] * 100, 100, SEVERAL, seed=0)


def test_errors(model, tmp_path):
    store = Store(tmp_path / "results.json", {})
    for wrong, match in (
        ({"selectors": ["astrology"]}, "selector must be one of exact, int8"),
        ({"selectors": ["exact/none"]}, "got 'exact/none'"),
        ({"selectors": ["exact/reuse1"]}, "/reuse2 where two layers do, .* got 'exact/reuse1'"),
        ({"selectors": ["exact/reuse2/reuse2"]}, "got 'exact/reuse2/reuse2'"),
        ({"selectors": ["exact/kv/all"]}, "got 'exact/kv/all'"),
        ({"selectors": ["indexer/kv"]}, "own groups say who shares"),
        ({"selectors": ["blocks+tail"]}, r"\+tail goes with selections of tokens"),
        ({"selectors": []}, "selectors must hold at least one"),
        ({"budgets": ["many"]}, "budget must be a number of keys or a share"),
        ({"budgets": ["120%"]}, "got '120%'"),
        ({"budgets": ["nan%"]}, "got 'nan%'"),
        ({"tasks": ["dance"]}, "tasks must be among text, recall, needles"),
        ({"documents": 0}, "documents must be at least 1"),
    ):
        with pytest.raises(ValueError, match=match):
            Plan(**wrong)
    with pytest.raises(ValueError, match=r"documents must have different names, .* got 0\.txt twice"):
        evaluate_model(model, documents() * 2, Plan(lengths=[LENGTH], tasks=["text"]), store)
    with pytest.raises(ValueError, match="no selection can have a budget of 5000 at 240 tokens"):
        evaluate_model(model, documents(), Plan(budgets=["5000"], lengths=[LENGTH], tasks=["text"]), store)
    with pytest.raises(ValueError, match="no document has more than 2048 tokens"):
        evaluate_model(model, documents(), Plan(tasks=["text"]), store)
    with pytest.raises(ValueError, match="needs an indexer in layer 0"):
        evaluate_model(model, documents(), Plan(["indexer"], tasks=["text"]), store)
    with pytest.raises(ValueError, match="encode must turn text into token ids"):
        evaluate_model(model, documents(), Plan(tasks=["needles"], lengths=[LENGTH]), store)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match=r"other\.json holds no results"):
        Store(tmp_path / "other.json", {})
