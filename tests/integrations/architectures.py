"""One tiny model of random weights per architecture that docs/huggingface.md speaks of."""

from __future__ import annotations

from typing import Any

import torch
import transformers

TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
BOTH: dict[str, Any] = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32,
    "patch_size": 16,
}  # fmt: skip
t = transformers

MODELS = {
    "Llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**TEXT)),
    "Mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**TEXT, sliding_window=8)),
    "Qwen 3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**TEXT)),
    "Gemma 2": lambda: t.Gemma2ForCausalLM(
        t.Gemma2Config(**TEXT, sliding_window=8, query_pre_attn_scalar=8, attn_logit_softcapping=1.5)
    ),
    "Gemma 3": lambda: t.Gemma3ForCausalLM(
        t.Gemma3TextConfig(
            **{**TEXT, "head_dim": 16, "num_key_value_heads": 1},
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
    "gpt-oss": lambda: t.GptOssForCausalLM(
        t.GptOssConfig(**TEXT, sliding_window=8, num_local_experts=2, num_experts_per_tok=1)
    ),
    "GPT-2": lambda: t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1)
    ),
    "Jamba (a Mamba hybrid)": lambda: t.JambaForCausalLM(
        t.JambaConfig(
            **{k: v for k, v in TEXT.items() if k != "head_dim"},
            attn_layer_period=2,
            attn_layer_offset=1,
            num_experts=2,
            num_experts_per_tok=1,
            use_mamba_kernels=False,
            mamba_d_state=4,
            mamba_dt_rank=4,
        )
    ),
    "BERT": lambda: t.BertModel(t.BertConfig(**TEXT)),
    "ViT": lambda: t.ViTModel(t.ViTConfig(**VISION)),
    "BART": lambda: t.BartForConditionalGeneration(t.BartConfig(**BOTH, max_position_embeddings=64)),
    "Whisper": lambda: t.WhisperForConditionalGeneration(
        t.WhisperConfig(**BOTH, max_source_positions=20, max_target_positions=40, num_mel_bins=8)
    ),
    "LLaVA": lambda: t.LlavaForConditionalGeneration(
        t.LlavaConfig(
            text_config=t.LlamaConfig(**TEXT), vision_config=t.CLIPVisionConfig(**VISION), image_token_id=5
        )
    ),
    "MiniMax": lambda: t.MiniMaxForCausalLM(
        t.MiniMaxConfig(**TEXT, num_local_experts=2, num_experts_per_tok=1, block_size=4)
    ),
    "T5": lambda: t.T5ForConditionalGeneration(
        t.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    ),
    "BLOOM": lambda: t.BloomForCausalLM(t.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
    "MPT": lambda: t.MptForCausalLM(t.MptConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4)),
    "Falcon": lambda: t.FalconForCausalLM(
        t.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    ),
    "Mamba": lambda: t.MambaForCausalLM(
        t.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    ),
}


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("sinks"):
                parameter.normal_()
    return model
