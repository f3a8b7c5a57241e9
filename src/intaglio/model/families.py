"""The architectures, as rows of data: where the projections of a layer are, and what moves together with its heads.

A family is recognised by its module paths, never by a class name, so that a new model which follows an old layout works
unchanged. To support another layout, add a row.
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
    fused: str = ""  # "": alone; "blocks": role after role (Phi-3); "heads": interleaved head by head (GPT-NeoX)
    order: tuple[str, ...] = ()  # the roles of a fused weight, in their order there
    parameter: str = "weight"  # [out, in], or [experts, out, in]


@dataclass(frozen=True)
class Family:
    """One row: the parameters of a decoder (or encoder) layer.

    `followers` names, by role, parameters that hold one value per position of that role's heads (norms over all heads,
    biases kept apart from their weight): whoever reorders heads reorders them too. Absent ones are passed over.
    """

    name: str
    roles: Mapping[str, Role]
    followers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def _separate(**paths: str) -> dict[str, Role]:
    return {role: Role(path) for role, path in paths.items()}


def _fused(path: str, fused: str, *order: str, parameter: str = "weight") -> dict[str, Role]:
    return {role: Role(path, fused, order, parameter) for role in order}


def _attention(path: str, o: str = "o_proj") -> dict[str, Role]:
    return _separate(**{role: f"{path}.{role}_proj" for role in "qkv"}, o=f"{path}.{o}")


# Norms over the concatenated heads (OLMo-2); one that all heads share (Qwen3) has another length and stays.
_NORMS = {"q": ("self_attn.q_norm.weight",), "k": ("self_attn.k_norm.weight",)}

_ENCODER_OUTPUTS = _separate(o="attention.output.dense", up="intermediate.dense", down="output.dense")

FAMILIES: tuple[Family, ...] = (
    # Llama, Mistral, Qwen2, Qwen3, Gemma, OLMo-2, SmolLM, Granite …
    Family(
        "llama",
        _attention("self_attn") | _separate(gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj"),
        _NORMS,
    ),
    # Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE …: one channel is that channel of every expert; shared experts stay frozen
    Family(
        "mixture_of_experts",
        _attention("self_attn")
        | _fused("mlp.experts", "blocks", "gate", "up", parameter="gate_up_proj")
        | {"down": Role("mlp.experts", parameter="down_proj")},
        _NORMS,
    ),
    Family("opt", _attention("self_attn", "out_proj") | _separate(up="fc1", down="fc2")),
    Family(
        "phi3",
        _fused("self_attn.qkv_proj", "blocks", "q", "k", "v")
        | _fused("mlp.gate_up_proj", "blocks", "gate", "up")
        | _separate(o="self_attn.o_proj", down="mlp.down_proj"),
    ),
    Family(
        "gpt2",
        _fused("attn.c_attn", "blocks", "q", "k", "v") | _separate(o="attn.c_proj", up="mlp.c_fc", down="mlp.c_proj"),
    ),
    Family(
        "gpt_neox",
        _fused("attention.query_key_value", "heads", "q", "k", "v")
        | _separate(o="attention.dense", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"),
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
        _fused("attention.self.in_proj", "heads", "q", "k", "v") | _ENCODER_OUTPUTS,
        {
            "q": ("attention.self.q_bias", "attention.self.pos_q_proj.weight", "attention.self.pos_q_proj.bias"),
            "k": ("attention.self.pos_proj.weight",),
            "v": ("attention.self.v_bias",),
        },
    ),
)
