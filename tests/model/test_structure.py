import pytest
import torch
import transformers as tf
from torch import nn

from intaglio import S2FT, attach
from intaglio.model.families import ROLES
from intaglio.model.structure import describe
from support import tiny


def bias_of(parameters, projection):
    """The bias of a projection, also of stacked experts."""
    name = projection.parameter
    return parameters.get(name.removesuffix("weight") + "bias" if name.endswith(".weight") else f"{name}_bias")


def zero(model, projection, units, bias=0.0):
    """Zero the units of a projection, its bias too where the units are outputs."""
    parameters = dict(model.named_parameters())
    index, own = projection.index(torch.tensor(units)), bias_of(parameters, projection)
    with torch.no_grad():
        parameters[projection.parameter].index_fill_(projection.dim, index, 0.0)
        if own is not None and own.shape[-1] == projection.shape[projection.dim]:
            own.index_fill_(own.dim() - 1, index, bias)


def without_bias(model, projection):
    """Drop the bias of an output projection, which belongs to no unit."""
    bias = bias_of(dict(model.named_parameters()), projection)
    if bias is not None:
        with torch.no_grad():
            bias.zero_()


def logits(name, edits, at=slice(None)):
    """The outputs of a tiny model with units of its layers `at` zeroed."""
    model = tiny.build(name)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith((".q_bias", ".v_bias")):  # DeBERTa keeps these beside its fused projection
            nn.init.zeros_(parameter)
    for layer in describe(model):
        for role in {"o", "down"} & layer.projections.keys():
            without_bias(model, layer.projections[role])
    for layer in describe(model)[at]:
        for role, units in edits.items():
            beside_one = role == "up" and name in ("experts_gpt_oss", "openai_privacy_filter")  # multiply by up + 1
            zero(model, layer.projections[role], units, bias=-1.0 if beside_one else 0.0)
    batch = tiny.batch(name)
    del batch["labels"]
    with torch.no_grad():
        return model(**batch)[0]


@pytest.mark.parametrize("name", tiny.DESCRIBED)
def test_every_layer_has_every_role(name):
    layers = describe(tiny.build(name))
    assert len(layers) == (4 if name in ("bart", "t5") else 2)
    for layer in layers:
        keys = {"gemma4_shared": {"k", "v"}, "gemma4_moe": {"v"}}.get(name, set()) if layer is layers[1] else set()
        assert set(ROLES) - {"gate"} - keys <= layer.projections.keys()


@pytest.mark.parametrize("name", tiny.CHANNELS)
def test_channels_of_every_layer(name):
    """Layers without heads say so; those of Nemotron-H that only mix tokens have no channels and are left out."""
    layers = describe(tiny.build(name))
    assert len(layers) == (1 if name == "nemotron_h" else 2)
    assert all(layer.projections.keys() >= {"up", "down"} for layer in layers)
    assert all(("o" in layer.projections) == (not layer.unread) for layer in layers)
    with pytest.raises(
        ValueError, match=r"S2FT: .*\.0 has no o projection: its attention is not .*o=None" if name != "nemotron_h" else "o=None"
    ):
        attach(tiny.build(name), S2FT(o=0.25))


# A layer that takes keys and values from another sees what is silenced there.
@pytest.mark.parametrize("at", [slice(0, 1), slice(-1, None)], ids=["first", "last"])
@pytest.mark.parametrize("name", [n for n in tiny.DESCRIBED if n not in ("gemma4_shared", "gemma4_moe")])
def test_silencing_a_value_head_is_silencing_its_output_columns(name, at):
    """v rows of kv head j feed exactly the o columns of the query heads of group j: proves both index maps."""
    projections = describe(tiny.build(name))[at][0].projections
    queries, groups = projections["o"].units, projections["v"].units
    group = groups - 1
    heads = [group * (queries // groups) + i for i in range(queries // groups)]
    base, by_value, by_output = logits(name, {}), logits(name, {"v": [group]}, at), logits(name, {"o": heads}, at)
    torch.testing.assert_close(by_value, by_output, rtol=0, atol=1e-5)
    assert (by_value - base).abs().max() > 1e-4


@pytest.mark.parametrize("name", tiny.DESCRIBED | tiny.CHANNELS)
def test_silencing_an_up_channel_is_silencing_its_down_column(name):
    by_up, by_down = logits(name, {"up": [3, 20]}), logits(name, {"down": [3, 20]})
    torch.testing.assert_close(by_up, by_down, rtol=0, atol=1e-5)
    assert (by_up - logits(name, {})).abs().max() > 1e-4


GATED = [n for n in tiny.DESCRIBED | tiny.CHANNELS if "gate" in describe(tiny.build(n))[0].projections]


@pytest.mark.parametrize("name", GATED)
def test_gate_channels(name):
    torch.testing.assert_close(logits(name, {"gate": [0, 7]}), logits(name, {"down": [0, 7]}), rtol=0, atol=1e-5)


# Not true where a norm over all heads (OLMo-2), one with a bias (Persimmon) or DeBERTa's position terms couple the heads, a
# head's query rows hold its output gate (Qwen 3.5), its keys are its values (Gemma 4), or all share a part (DeepSeek).
OTHER_KEYS = ("qk_norm_olmo2", "persimmon", "deberta", "deberta_v2", "gated_qwen3_5", "gemma4_moe", "gemma4_shared")


@pytest.mark.parametrize("name", [n for n in tiny.DESCRIBED if n not in OTHER_KEYS and "deepseek" not in n])
def test_silencing_a_key_head_is_silencing_its_query_heads(name):
    """Without keys, or without queries, attention of those heads is uniform."""
    projections = describe(tiny.build(name))[-1].projections
    queries, groups = projections["q"].units, projections["k"].units
    heads = list(range(queries // groups))
    by_key, by_query = (logits(name, edits, slice(-1, None)) for edits in ({"k": [0]}, {"q": heads}))
    torch.testing.assert_close(by_key, by_query, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", tiny.DESCRIBED)
def test_owners_inverts_index(name):
    for projection in describe(tiny.build(name))[1].projections.values():
        units = torch.tensor([0, projection.units - 1]).unique()
        assert torch.equal(projection.owners(projection.index(units)), units)


def test_roles_of_a_fused_weight_do_not_overlap():
    for name in ("fused_phi3", "transposed_gpt2", "interleaved_neox", "deberta", "grouped_falcon", "falcon_mqa"):
        projections = describe(tiny.build(name))[0].projections
        index = [projections[r].index(torch.arange(projections[r].units)) for r in "qkv"]
        assert torch.equal(torch.cat(index).sort().values, torch.arange(projections["q"].shape[projections["q"].dim]))


def test_home_made_stack_is_described_by_shape():
    layer = describe(tiny.Homemade())[0]
    assert layer.projections.keys() == {"up", "down"}
    assert layer.projections["down"].parameter == "blocks.0.narrow.weight"
    assert layer.projections["down"].units == 20


def test_headless_encoder_is_described():
    model = tf.BertModel(tf.BertConfig(**tiny.COMMON))
    assert describe(model)[0].projections["o"].parameter == "encoder.layer.0.attention.output.dense.weight"


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))])
def test_unknown_model_is_refused_by_name(model):
    with pytest.raises(ValueError, match=type(model).__name__):
        describe(model)


def test_stacks_of_sparse_and_dense_layers():
    """Each layer by its own row; a layer that no row fits is refused, not passed over."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}
    settings = tiny.LLAMA | {"num_key_value_heads": 2} | experts
    mixed = tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**settings, mlp_only_layers=[0]))
    dense, sparse = (layer.projections["down"] for layer in describe(mixed))
    assert (dense.parameter, dense.units) == ("model.layers.0.mlp.down_proj.weight", 48)
    assert (sparse.parameter, sparse.units, sparse.dim) == ("model.layers.1.mlp.experts.down_proj", 24, 2)
    mixed.model.layers[1].mlp = torch.nn.Linear(32, 32)
    with pytest.raises(ValueError, match=r"model\.layers\.1 is not built like the other layers"):
        describe(mixed)


def test_impossible_head_count_is_refused():
    model = tiny.build("mha_llama")
    model.config.num_attention_heads, model.config.head_dim = 5, 8
    with pytest.raises(ValueError, match=r"S2FT: model\.layers\.0 has no o projection: 5 heads of 8.*e\.g\. o=None"):
        attach(model, S2FT(o=0.5))
    assert {"o_proj" in name for name in attach(model, S2FT(o=None, down=0.1)).selection} == {False}
