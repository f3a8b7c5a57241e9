"""Tiny models of architectures that share the traits of `tiny.MODELS` in other combinations, or are understood in part.

Structure, permutation and a training step are tested over them, not the whole contract of every method.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as tf

_SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_DECODER = _SIZES | {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED = _DECODER | {"num_key_value_heads": 2}
_GPT = {"vocab_size": 96, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48}
_QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
_FALCON = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 48}
_MIXTURE = {"num_local_experts": 3, "num_experts_per_tok": 2}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1}
_LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
_LATENT |= _ROUTED | {"first_k_dense_replace": 1, "n_shared_experts": 1}
_MAMBA = {"mamba_d_head": 16, "mamba_n_heads": 4, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_expand": 2}
_DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_GEMMA4 = _SLIDING | {"head_dim": 8, "global_head_dim": 16, "num_kv_shared_layers": 0}
_GEMMA4 |= {"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8}
_BART = {"vocab_size": 96, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 64}
_BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40}
_BART |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "dropout": 0.0}


def _made(name: str, *, config: str = "", model: str = "ForCausalLM", **fields: Any) -> Callable[[], tf.PreTrainedModel]:
    kind = getattr(tf, config or f"{name}Config")
    return lambda: getattr(tf, f"{name}{model}")(kind(**fields))


# One for each structural trait: part of `tiny.MODELS`
TRAITS: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "grouped_falcon": _made("Falcon", **_FALCON, new_decoder_architecture=True, num_kv_heads=2, bias=True),
    "experts_gpt_oss": _made("GptOss", **_GROUPED, **_MIXTURE, head_dim=8, sliding_window=8),
    "latent_deepseek_v3": _made("DeepseekV3", **_DECODER, **_LATENT, q_lora_rank=16),
    "gated_qwen3_5": _made(
        "Qwen3_5", config="Qwen3_5TextConfig", **_GROUPED, **_DELTA, head_dim=8, layer_types=["full_attention"] * 2
    ),
    "widths_gemma4": _made("Gemma4", config="Gemma4TextConfig", **_GROUPED, **_GEMMA4),
}
# Whose heads and channels are both known
LAYOUTS: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "starcoder2": _made("Starcoder2", **_GROUPED, residual_dropout=0.0, embedding_dropout=0.0),
    "nemotron": _made("Nemotron", **_GROUPED, head_dim=8),
    "arcee": _made("Arcee", **_GROUPED),
    "apertus": _made("Apertus", **_GROUPED, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
    "jais2": _made("Jais2", **_GROUPED),
    "glm": _made("Glm", **_GROUPED, head_dim=8),
    "glm4": _made("Glm4", **_GROUPED, head_dim=8),
    "glm4_moe": _made("Glm4Moe", **_GROUPED, **_ROUTED, head_dim=8, n_shared_experts=1, first_k_dense_replace=1),
    "falcon_mha": _made("Falcon", **_FALCON, multi_query=False, parallel_attn=False, bias=True),
    "falcon_mqa": _made("Falcon", **_FALCON, multi_query=True, parallel_attn=True, bias=False),
    "falcon_alibi": _made("Falcon", **_FALCON, multi_query=False, parallel_attn=False, alibi=True),
    "bloom": _made("Bloom", vocab_size=96, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0),
    "mpt": _made("Mpt", vocab_size=96, d_model=32, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=64),
    "persimmon": _made("Persimmon", **_DECODER, hidden_dropout=0.0),
    "phi": _made("Phi", **_GROUPED, resid_pdrop=0.0, embd_pdrop=0.0),
    "gptj": _made("GPTJ", **_GPT, **_QUIET, rotary_dim=4),
    "gpt_neo": _made(
        "GPTNeo",
        vocab_size=96,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        intermediate_size=48,
        max_position_embeddings=64,
        resid_dropout=0.0,
        embed_dropout=0.0,
        attention_dropout=0.0,
    ),
    "gpt_bigcode_mqa": _made("GPTBigCode", **_GPT, **_QUIET),
    "gpt_bigcode_mha": _made("GPTBigCode", **_GPT, **_QUIET, multi_query=False),
    "deepseek_v2_lite": _made("DeepseekV2", **_DECODER, **_LATENT, q_lora_rank=None, topk_method="greedy"),
    "gemma4_shared": _made(
        "Gemma4",
        config="Gemma4TextConfig",
        **_GROUPED,
        **_GEMMA4 | {"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 2, "global_head_dim": 8},
    ),
    "gemma4_moe": _made(
        "Gemma4",
        config="Gemma4TextConfig",
        **_GROUPED,
        **_GEMMA4,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        enable_moe_block=True,
        num_experts=3,
        top_k_experts=2,
        moe_intermediate_size=24,
    ),
    "gemma3n": _made(
        "Gemma3n",
        config="Gemma3nTextConfig",
        **_GROUPED | {"intermediate_size": [48, 48]},
        **_SLIDING,
        head_dim=8,
        num_kv_shared_layers=0,
        vocab_size_per_layer_input=96,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0, 0.0],
    ),
    "llama4": _made(
        "Llama4", config="Llama4TextConfig", **_GROUPED, head_dim=8, intermediate_size_mlp=40, num_local_experts=2, moe_layers=[1]
    ),
    "openai_privacy_filter": _made(
        "OpenAIPrivacyFilter", model="ForTokenClassification", **_GROUPED, **_MIXTURE, head_dim=8, sliding_window=8, num_labels=96
    ),
    "granite_moe": _made("GraniteMoe", **_GROUPED, **_MIXTURE),
    "modernbert": _made(
        "ModernBert", model="ForSequenceClassification", **_DECODER, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2
    ),
    "modernbert_decoder": _made("ModernBertDecoder", **_DECODER, cls_token_id=1, sep_token_id=2),
    "distilbert": _made(
        "DistilBert",
        model="ForSequenceClassification",
        vocab_size=96,
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=48,
        max_position_embeddings=64,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
    ),
    "bart": _made("Bart", model="ForConditionalGeneration", **_BART),
    "t5": _made(
        "T5",
        model="ForConditionalGeneration",
        vocab_size=96,
        d_model=32,
        d_kv=4,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        decoder_start_token_id=0,
    ),
    "clip_text": _made("CLIPText", model="Model", **_DECODER),
}
# Whose channels are known, and the heads of some layers at most
CHANNELS: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "qwen3_next": _made(
        "Qwen3Next",
        **_GROUPED,
        **_DELTA,
        **_HYBRID,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=16,
    ),
    "qwen3_5": _made("Qwen3_5", config="Qwen3_5TextConfig", **_GROUPED, **_DELTA, **_HYBRID, head_dim=8),
    "minimax": _made("MiniMax", **_GROUPED, **_MIXTURE, **_HYBRID, head_dim=8, block_size=8),
    "jamba": _made(
        "Jamba", **_GROUPED, num_experts=2, num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8
    ),
    "bamba": _made("Bamba", **_GROUPED, **_MAMBA, attn_layer_indices=[1]),
    "granite_hybrid": _made(
        "GraniteMoeHybrid",
        **_GROUPED,
        **_MAMBA,
        num_local_experts=0,
        layer_types=["mamba", "attention"],
        shared_intermediate_size=48,
    ),
    "nemotron_h": _made(
        "NemotronH",
        **_GROUPED | {"num_hidden_layers": 4},
        head_dim=8,
        hybrid_override_pattern="M*-M",
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=1,
        ssm_state_size=8,
    ),
    "recurrent_gemma": _made("RecurrentGemma", **_GROUPED, head_dim=8, block_types=("recurrent", "attention"), lru_width=32),
    "lfm2": _made("Lfm2", **_GROUPED, layer_types=["conv", "full_attention"]),
    "codegen": _made("CodeGen", **_GPT, **_QUIET, rotary_dim=4),
    "albert": _made("Albert", model="ForSequenceClassification", **_DECODER, embedding_size=16, num_hidden_groups=2),
}
# A bias that differs from head to head (ALiBi, T5's table) or keys that another layer has tie heads to their places
FIXED_HEADS = ("falcon_alibi", "bloom", "mpt", "t5", "gemma4_shared")
