"""docs/huggingface.md says per architecture what works: each row is tried."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from sparse_attn.integrations import transformers as sparse_transformers  # noqa: E402
from sparse_attn.integrations.self_test import attention_modules, tokens_for  # noqa: E402
from tests.integrations.architectures import MODELS, build  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "huggingface.md"


def rows():
    """Architecture → what the table says of top_k with sinks, and with a window."""
    lines = PAGE.read_text().split("| architecture |")[1].splitlines()[2:]
    table = {}
    for line in lines:
        if not line.startswith("|"):
            break
        name, plain, window, _ = (cell.strip() for cell in line.strip("|").split("|"))
        table[name] = {"plain": plain, "window": window}
    return table


def state(model):
    """Whatever a configuration could change."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    return (
        [dict(c.__dict__) for c in configs],
        [(n, m.training, sorted(m.__dict__), len(m._forward_pre_hooks)) for n, m in model.named_modules()],
        torch.get_rng_state().tolist(),
    )


def test_the_table_has_these_architectures():
    assert list(rows()) == list(MODELS)


@pytest.mark.parametrize("options", ["plain", "window"])
@pytest.mark.parametrize("name", list(MODELS))
def test_configure_does_what_the_table_says(name, options):
    said = rows()[name][options]
    model = build(name)
    more = {"top_k": 3, "sinks": 1} if options == "plain" else {"top_k": 3, "window": 2}
    before = state(model)
    if said == "✓":
        sparse_transformers.configure(model, **more)
        after = state(model)
        assert after[2] == before[2]
        # The one thing that stays on the modules is the hook by which an attention shows its cache to its key index.
        shows = attention_modules(model)
        expected = [(name, training, hooks + (name in shows)) for name, training, _, hooks in before[1]]
        assert [(name, training, hooks) for name, training, _, hooks in after[1]] == expected
        with torch.no_grad():
            model(**tokens_for(model))
        return
    with pytest.raises(ValueError) as refusal:
        sparse_transformers.configure(model, **more)
    assert said.removeprefix("refused: ") in str(refusal.value)
    assert state(model) == before


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "gpt-oss", "GPT-2", "Jamba (a Mamba hybrid)", "BART"])
def test_a_budget_of_all_keys_is_eager_attention(name):
    model = build(name)
    model.set_attn_implementation("eager")
    given = tokens_for(model)
    with torch.no_grad():
        theirs = model(**given).logits
        sparse_transformers.configure(model, top_k=64)
        ours = model(**given).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
