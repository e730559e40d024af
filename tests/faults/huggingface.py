"""Models of Hugging Face transformers: small ones of random weights, against themselves with dense attention."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch

import sparse_attn as sa
from faults import case, off_by, refused

SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip


def _llama(**changes: Any):
    import transformers

    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SHAPE, **changes})).eval()


def _bert():
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertModel(config).eval()


def _configure(model, **options: Any):
    import sparse_attn.integrations.transformers as sparse_transformers

    return sparse_transformers.configure(model, **options)


def _ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(2, 64, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _logits(model, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    return model(ids, **more).logits


@case(
    "a window on a model without an order of tokens (BERT), padded batch",
    "a sentence depends on its batch-mate",
)
def window_without_order() -> str:
    return refused(lambda: _configure(_bert(), top_k=3, window=2), "window")


@case("packed documents (`position_ids`) with sinks", "the second document off by 1.24")
def sinks_of_packed_documents() -> str:
    model = _configure(_llama(), top_k=6, window=2, sinks=2)
    first, second = _ids(1, 14), _ids(1, 17).flip(1)
    packed = torch.cat((first, second), 1)
    positions = torch.cat((torch.arange(14), torch.arange(17)))[None]
    # With a cache transformers packs nothing, in dense attention either.
    together = _logits(model, packed, position_ids=positions, use_cache=False)
    off_by(together[:, :14], _logits(model, first), 1e-5)
    return "second document " + off_by(together[:, 14:], _logits(model, second), 1e-5)


@case("`save_pretrained`, then `from_pretrained` of a configured model", "dense, off by 7.3")
def saved_and_loaded() -> str:
    import transformers

    model, ids = _configure(_llama(), top_k=4, window=1, sinks=1), _ids(2, 24)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    return "sparse again, " + off_by(_logits(again, ids), _logits(model, ids), 1e-6)


@case("a window on attention that is neither causal nor masked (BERT)", "TypeError of torch.where")
def window_without_mask() -> str:
    model = _bert()
    sentence = refused(lambda: _configure(model, top_k=3, window=2), "window")
    assert model.config._attn_implementation != "sparse_attn"
    model(_ids(2, 9))
    return sentence


@case('window, sinks and `share="all"` of a Llama under torch.compile', "10 breaks, fullgraph fails")
def readme_configuration_compiles() -> str:
    model, ids = _configure(_llama(), top_k=8, window=4, sinks=2, share="all"), _ids(2, 24)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    eager = _logits(model, ids, attention_mask=mask)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    return "one graph, " + off_by(
        _logits(compiled, ids, attention_mask=mask)[mask > 0], eager[mask > 0], 1e-5
    )


@case(
    "blocks, refined blocks and residual under torch.compile, T from 256 to 384", "refused, as another mask"
)
def blocks_compile() -> str:
    found = []
    for options in ({"selector": "blocks"}, {"selector": "refined_blocks"}, {"residual": True}):
        torch._dynamo.reset()
        model = _configure(_llama(max_position_embeddings=512, num_hidden_layers=1), top_k=192, **options)
        compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
        for length in (256, 384):
            ids = _ids(1, length)
            found.append(off_by(_logits(compiled, ids), _logits(model, ids), 1e-5))
    return "one graph each, " + ", ".join(dict.fromkeys(found))


@case("a soft cap (Gemma 2), per-head sink logits (gpt-oss)", "refused at the first forward")
def soft_cap_and_sink_logits() -> str:
    import transformers

    shape = {**SHAPE, "head_dim": 8}
    torch.manual_seed(0)
    gemma = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**shape, query_pre_attn_scalar=8, attn_logit_softcapping=1.5)
    )
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    oss = transformers.GptOssForCausalLM(transformers.GptOssConfig(**shape, **experts, sliding_window=8))
    found = []
    for model in (gemma.eval(), oss.eval()):
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                torch.nn.init.normal_(parameter)
        model.set_attn_implementation("eager")
        sparse, ids = _configure(copy.deepcopy(model), top_k=64), _ids(2, 24)
        found.append(off_by(_logits(sparse, ids), _logits(model, ids), 1e-4))
    return f"Gemma 2 {found[0]}, gpt-oss {found[1]} against eager"


@case("a position bias (T5)", "refused at the first forward")
def position_bias() -> str:
    import transformers

    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    return refused(lambda: _configure(transformers.T5ForConditionalGeneration(config), top_k=8), "T5")


@case(
    "a model with indexers through `save_pretrained` and `from_pretrained`",
    "“unexpected keys”, then an error",
)
def indexers_saved() -> str:
    import transformers

    import sparse_attn.integrations.transformers as sparse_transformers

    model, ids = _llama(), _ids(2, 24)
    sparse_transformers.add_indexers(model)
    model = _configure(model, top_k=4, selector="indexer")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        try:
            again = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
            found = _logits(again, ids)
        except ValueError:
            return refused(lambda: _logits(again, ids), "load_indexers")
    return "sparse again, " + off_by(found, _logits(model, ids), 1e-6)


@case("a VariableWidthEmbedding as a model's input embedding, then resize", "AttributeError about `weight`")
def embedding_in_a_model() -> str:
    model, ids = _llama(), _ids(2, 9)
    plan = sa.WidthPlan.from_cutoffs(64, 48, cutoffs=[16], widths=[48, 8])
    model.set_input_embeddings(sa.nn.VariableWidthEmbedding(plan))
    _logits(model, ids)
    return refused(lambda: model.resize_token_embeddings(80), "VariableWidthEmbedding")


@case("a padded batch with sinks", "one sequence at a time, in Python")
def padded_batch_with_sinks() -> str:
    model, ids = _configure(_llama(), top_k=6, window=2, sinks=2), _ids(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    calls = []
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(str(function))
            return function(*args, **(kwargs or {}))

    with Count():
        padded = _logits(model, ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    ours = sum("sparse_attn" in name for name in calls)
    assert ours == 2, f"{ours} calls of ours in two layers"
    return "one call a layer, " + off_by(padded[1, 7:], _logits(model, ids[1:, 7:])[0], 1e-5)


@case("a sparse model loaded and saved again without a forward between", "dense when loaded the second time")
def saved_again() -> str:
    import transformers

    model, ids = _configure(_llama(), top_k=4, window=1, sinks=1), _ids(2, 24)
    before = _logits(model, ids)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            model.save_pretrained(folder)
            model = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    return "sparse again, " + off_by(_logits(model, ids), before, 1e-6)


@case('`set_attn_implementation("sdpa")` of a sparse model, then `save_pretrained`', "sparse when loaded")
def saved_as_dense() -> str:
    import transformers

    model, ids = _configure(_llama(), top_k=4, window=1, sinks=1), _ids(2, 24)
    model.set_attn_implementation("sdpa")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    return "dense, " + off_by(_logits(again, ids), _logits(model, ids), 1e-6)


@case("`distill_indexers` on Gemma 2, gpt-oss and Mistral", "soft caps, sinks and sliding windows left out")
def distillation_of_other_softmaxes() -> str:
    import transformers

    import sparse_attn.integrations.transformers as sparse_transformers
    from sparse_attn.distillation import distill_indexers

    torch.manual_seed(0)
    shape, more = (
        {**SHAPE, "head_dim": 8, "sliding_window": 8},
        {"num_local_experts": 2, "num_experts_per_tok": 1},
    )
    models = (
        transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**shape, attn_logit_softcapping=1.5)),
        transformers.GptOssForCausalLM(transformers.GptOssConfig(**shape, **more)),
        transformers.MistralForCausalLM(transformers.MistralConfig(**shape)),
    )
    found, ids = [], _ids(1, 24)
    for model in models:
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight", "sinks")):
                torch.nn.init.normal_(parameter, std=0.3)
        model.eval().set_attn_implementation("eager")
        mass = model(ids, output_attentions=True, use_cache=False).attentions
        sparse_transformers.add_indexers(model, num_heads=1, head_dim=8)
        wanted = []
        for number, indexer in sparse_transformers.indexers(model).items():
            indexer.weight.weight.zero_()  # every visible key alike: the loss is a matter of the attention alone
            each = mass[number].double().mean(1)
            each = each / each.sum(-1, keepdim=True)
            seen = (each > 0).sum(-1, keepdim=True)
            wanted.append((torch.xlogy(each, each * seen)).sum(-1).mean())
        (loss,) = distill_indexers(model, [ids], 1, dense_steps=1)
        found.append(off_by(torch.tensor(loss), torch.stack(wanted).mean().float(), 1e-5))
    return "the layer's own attention, " + ", ".join(dict.fromkeys(found))


@case(
    "`tie_weights` of a model with a VariableWidthEmbedding",
    "transformers' words, or a parameter that nothing reads",
)
def tied_to_an_embedding_of_bands() -> str:
    model = _llama(tie_word_embeddings=True)
    model.set_input_embeddings(
        sa.nn.VariableWidthEmbedding(sa.WidthPlan.from_cutoffs(64, 48, cutoffs=[16], widths=[48, 8]))
    )
    return refused(model.tie_weights, "VariableWidthHead")


@case(
    "packed documents by `cu_seq_lens_q`, and by `position_ids` beside an empty cache",
    "one document saw another",
)
def documents_by_their_bounds() -> str:
    model, ids = _configure(_llama(), top_k=6, window=2, sinks=2), _ids(1, 31)
    positions = torch.cat((torch.arange(14), torch.arange(17)))[None]
    found = []
    for told in (
        {"cu_seq_lens_q": torch.tensor([0, 14, 31])},
        {"position_ids": positions, "use_cache": True},
    ):
        together = _logits(model, ids, **told)
        found.append(off_by(together[:, :14], _logits(model, ids[:, :14]), 1e-5))
        found.append(off_by(together[:, 14:], _logits(model, ids[:, 14:]), 1e-5))
    return "each as alone, " + ", ".join(dict.fromkeys(found))
