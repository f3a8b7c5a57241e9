"""The architectures, as rows of data: where the projections of a layer are, and what moves together with its heads.

A family is recognised by its module paths and sizes, never by a class name, so that a new model which follows an old layout
works unchanged. Attention and FFN are looked up apart: a layer may have the attention of one row and the FFN of another. To
support another layout, add a row with what is new in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["FAMILIES", "ROLES", "Family", "Role"]

ROLES = ("q", "k", "v", "o", "up", "gate", "down")


@dataclass(frozen=True)
class Role:
    """The weight of one role inside a layer: a module path, and its place if several roles share one fused weight."""

    path: str
    # "": alone; "blocks": role after role (Phi-3); "units": unit by unit, where query heads stand beside the key and value
    # head that they share (GPT-NeoX, Falcon), and each channel's gate beside its up (GPT-OSS)
    fused: str = ""
    order: tuple[str, ...] = ()  # the roles of a fused weight, in their order there
    parameter: str = "weight"  # [out, in], or [experts, out, in]
    transposed: bool = False  # whether experts are stored [experts, in, out]
    parts: int = 1  # 2: a head's rows are its query and then its output gate (Qwen3-Next)


@dataclass(frozen=True)
class Family:
    """One row: parameters of a decoder (or encoder) layer, of its attention, its FFN or both.

    Attributes:
        roles: where each weight is.
        followers: by role, parameters that hold one value per position of that role's heads (norms over all heads, biases
            kept apart from their weight): whoever reorders heads reorders them too. Absent ones are passed over.
        per_head: parameters that hold one value per query head (attention sinks).
        widths: by role, the attribute of the attention module that says how wide its heads are, where roles differ.
        marker: an attribute below the layer that tells this row from another with the same paths.
    """

    name: str
    roles: Mapping[str, Role]
    followers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    per_head: tuple[str, ...] = ()
    widths: Mapping[str, str] = field(default_factory=dict)
    marker: str = ""


def _separate(**paths: str) -> dict[str, Role]:
    return {role: Role(path) for role, path in paths.items()}


def _fused(path: str, fused: str, *order: str, parameter: str = "weight", transposed: bool = False) -> dict[str, Role]:
    return {role: Role(path, fused, order, parameter, transposed) for role in order}


def _attention(path: str, o: str = "o_proj") -> dict[str, Role]:
    return _separate(**{role: f"{path}.{role}_proj" for role in "qkv"}, o=f"{path}.{o}")


def _by_heads(path: str, o: str = "dense") -> dict[str, Role]:
    return _fused(f"{path}.query_key_value", "units", "q", "k", "v") | _separate(o=f"{path}.{o}")


def _experts(path: str, fused: str = "blocks", *, transposed: bool = False) -> dict[str, Role]:
    """One channel is that channel of every expert; shared experts stay frozen."""
    up = _fused(path, fused, "gate", "up", parameter="gate_up_proj", transposed=transposed)
    return up | {"down": Role(path, parameter="down_proj", transposed=transposed)}


# Norms over the concatenated heads (OLMo-2); one that all heads share (Qwen3) has another length and stays.
_NORMS = {"q": ("self_attn.q_norm.weight",), "k": ("self_attn.k_norm.weight",)}
_ENCODER_OUTPUTS = _separate(o="attention.output.dense", up="intermediate.dense", down="output.dense")
# Latent attention (DeepSeek): a head's key is the part without positions; the rest of it is shared by all heads.
_LATENT = _fused("self_attn.kv_b_proj", "units", "k", "v") | _separate(o="self_attn.o_proj")
_LATENT_WIDTHS = {"q": "qk_head_dim", "k": "qk_nope_head_dim", "v": "v_head_dim", "o": "v_head_dim"}

FAMILIES: tuple[Family, ...] = (
    # Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek …; Jamba; Granite-MoE; Gemma 4, beside an FFN of its own that stays frozen
    Family("mixture_of_experts", _experts("mlp.experts")),
    Family("jamba", _experts("feed_forward.experts")),
    Family("granite_moe", _experts("block_sparse_moe.experts")),
    Family("gemma4_moe", _experts("experts")),
    Family("llama4", _experts("feed_forward.experts", transposed=True)),
    Family("gpt_oss", _experts("mlp.experts", "units", transposed=True)),
    Family("openai_privacy_filter", _experts("mlp.experts", transposed=True)),
    # Llama, Mistral, Qwen2, Qwen3, Gemma, OLMo-2, SmolLM, Granite …; the attention of GPT-OSS, which has sinks
    Family(
        "llama",
        _attention("self_attn") | _separate(gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj"),
        _NORMS,
        per_head=("self_attn.sinks",),
    ),
    Family("nemotron", _separate(up="mlp.up_proj", down="mlp.down_proj")),
    Family("qwen3_next", _attention("self_attn") | {"q": Role("self_attn.q_proj", parts=2)}),
    # Layers whose values are their keys, and layers that take both from an earlier one
    Family(
        "gemma4_k_is_v",
        _separate(q="self_attn.q_proj", k="self_attn.k_proj", o="self_attn.o_proj"),
        marker="self_attn.use_alternative_attention",
    ),
    Family("gemma4_shared", _separate(q="self_attn.q_proj", o="self_attn.o_proj"), marker="self_attn.is_kv_shared_layer"),
    Family("deepseek", _LATENT | _separate(q="self_attn.q_b_proj"), widths=_LATENT_WIDTHS),
    Family("deepseek_lite", _LATENT | _separate(q="self_attn.q_proj"), widths=_LATENT_WIDTHS),
    Family("opt", _attention("self_attn", "out_proj") | _separate(up="fc1", down="fc2")),
    Family("phi", _attention("self_attn", "dense") | _separate(up="mlp.fc1", down="mlp.fc2")),
    Family(
        "phi3",
        _fused("self_attn.qkv_proj", "blocks", "q", "k", "v")
        | _fused("mlp.gate_up_proj", "blocks", "gate", "up")
        | _separate(o="self_attn.o_proj", down="mlp.down_proj"),
    ),
    Family(
        "gpt_bigcode",
        _fused("attn.c_attn", "units", "q", "k", "v") | _separate(o="attn.c_proj"),
        marker="attn.multi_query",
    ),
    Family(
        "gpt2",
        _fused("attn.c_attn", "blocks", "q", "k", "v") | _separate(o="attn.c_proj", up="mlp.c_fc", down="mlp.c_proj"),
    ),
    Family("gpt_neo", _attention("attn.attention", "out_proj")),
    Family("gptj", _attention("attn", "out_proj") | _separate(up="mlp.fc_in", down="mlp.fc_out")),
    Family("gpt_neox", _by_heads("attention") | _separate(up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h")),
    Family("falcon", _by_heads("self_attention")),
    Family("persimmon", _by_heads("self_attn")),
    Family("mpt", _fused("attn.Wqkv", "blocks", "q", "k", "v") | _separate(o="attn.out_proj")),
    Family(
        "modernbert",
        _fused("attn.Wqkv", "blocks", "q", "k", "v")
        | _fused("mlp.Wi", "blocks", "gate", "up")
        | _separate(o="attn.Wo", down="mlp.Wo"),
    ),
    Family("modernbert_decoder", _attention("attn", "Wo")),
    Family(
        "granite_hybrid", _fused("shared_mlp.input_linear", "blocks", "gate", "up") | _separate(down="shared_mlp.output_linear")
    ),
    # The attention between decoder and encoder stays frozen
    Family("t5", _separate(**{role: f"layer.0.SelfAttention.{role}" for role in "qkvo"})),
    Family("vit", _attention("attention")),
    Family(
        "distilbert",
        _separate(**{role: f"attention.{name}_lin" for role, name in zip("qkvo", ("q", "k", "v", "out"), strict=True)}),
    ),
    # BERT, RoBERTa, ELECTRA, XLM-R …
    Family(
        "bert",
        _separate(
            q="attention.self.query",
            k="attention.self.key",
            v="attention.self.value",
        )
        | _ENCODER_OUTPUTS,
    ),
    Family(
        "deberta_v2",
        _separate(
            q="attention.self.query_proj",
            k="attention.self.key_proj",
            v="attention.self.value_proj",
        )
        | _ENCODER_OUTPUTS,
        {
            "q": ("attention.self.pos_query_proj.weight", "attention.self.pos_query_proj.bias"),
            "k": ("attention.self.pos_key_proj.weight", "attention.self.pos_key_proj.bias"),
        },
    ),
    Family(
        "deberta",
        _fused("attention.self.in_proj", "units", "q", "k", "v") | _ENCODER_OUTPUTS,
        {
            "q": ("attention.self.q_bias", "attention.self.pos_q_proj.weight", "attention.self.pos_q_proj.bias"),
            "k": ("attention.self.pos_proj.weight",),
            "v": ("attention.self.v_bias",),
        },
    ),
)
