"""The examples run."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.studies import small_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import sparse_attn.integrations.transformers as sparse_transformers

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.mark.parametrize("top_k", [None, 8])
def test_nanogpt(top_k):
    train = runpy.run_path(str(EXAMPLES / "nanogpt.py"))["train"]
    assert train(top_k, steps=3) < 4.0  # a little over chance, ln 16 = 2.77, at the first steps


def test_packed(tmp_path):
    """An interrupted training ends where an uninterrupted one does, and learns."""
    train = runpy.run_path(str(EXAMPLES / "train_packed.py"))["train"]
    whole = train(6, tokens=600)
    file = str(tmp_path / "packed.pt")
    assert train(3, tokens=600, checkpoint=file) == whole[:3]
    assert train(6, tokens=600, checkpoint=file) == whole
    assert whole[-1] < whole[0]


@pytest.mark.parametrize("kind", ["DenseCache", "PagedCache"])
def test_serve_paged(kind):
    """Requests that arrive and leave get what the model's own generate gives each alone."""
    serving = SimpleNamespace(**runpy.run_path(str(EXAMPLES / "serve_paged.py"), run_name="serve_paged"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=89)).eval()
    requests = [
        serving.Request(torch.randint(1, 89, (n,)), 5, 2 * i) for i, n in enumerate((70, 130, 60, 90))
    ]
    room = (model.config, 2, 160, *([160] if kind == "PagedCache" else []))
    cache = getattr(serving, kind)(*room)
    pages = sorted(cache.free)
    serving.serve(model, cache, requests)
    assert sorted(cache.free) == pages
    for request in requests:
        ids = request.prompt[None]
        alone = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, eos_token_id=-1
        )
        assert request.tokens == alone[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("trained", [False, True])
def test_retrofit(trained, tmp_path, monkeypatch, capsys):
    folder, file = small_model(tmp_path / "model"), tmp_path / "indexers.safetensors"
    command = ["retrofit", "--model", str(folder), "--prompt", "w1 w2 w3", "--top-k", "8"]
    if trained:
        model = sparse_transformers.add_indexers(AutoModelForCausalLM.from_pretrained(folder), head_dim=8)
        sparse_transformers.save_indexers(model, file)
        command += ["--indexers", str(file)]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(EXAMPLES / "retrofit_smollm2.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith("w1 w2 w3 w")
