import pytest
import torch
import transformers as tf
from torch import nn

from intaglio.model.families import ROLES
from intaglio.model.structure import describe
from support import tiny


def zero(model, projection, units):
    """Zero the units of a projection, its bias too where the units are outputs."""
    parameters = dict(model.named_parameters())
    index = projection.index(torch.tensor(units))
    with torch.no_grad():
        parameters[projection.parameter].index_fill_(projection.dim, index, 0.0)
        bias = projection.parameter.removesuffix("weight") + "bias"
        if bias in parameters and parameters[bias].shape[0] == projection.shape[projection.dim]:
            parameters[bias].index_fill_(0, index, 0.0)


def without_bias(model, projection):
    """Drop the bias of an output projection, which belongs to no unit."""
    bias = projection.parameter.removesuffix("weight") + "bias"
    parameters = dict(model.named_parameters())
    if bias in parameters:
        with torch.no_grad():
            parameters[bias].zero_()


def logits(name, edits):
    model = tiny.build(name)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith((".q_bias", ".v_bias")):  # DeBERTa keeps these beside its fused projection
            nn.init.zeros_(parameter)
    for layer in describe(model):
        without_bias(model, layer.projections["o"])
        without_bias(model, layer.projections["down"])
        for role, units in edits.items():
            zero(model, layer.projections[role], units)
    batch = tiny.batch(name)
    del batch["labels"]
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("name", tiny.MODELS)
def test_every_layer_has_every_role(name):
    layers = describe(tiny.build(name))
    assert len(layers) == 2
    for layer in layers:
        assert set(ROLES) - {"gate"} <= layer.projections.keys()


@pytest.mark.parametrize("name", tiny.MODELS)
def test_silencing_a_value_head_is_silencing_its_output_columns(name):
    """v rows of kv head j feed exactly the o columns of the query heads of group j: proves both index maps."""
    projections = describe(tiny.build(name))[0].projections
    queries, groups = projections["o"].units, projections["v"].units
    group = groups - 1
    heads = [group * (queries // groups) + i for i in range(queries // groups)]
    base, by_value, by_output = logits(name, {}), logits(name, {"v": [group]}), logits(name, {"o": heads})
    torch.testing.assert_close(by_value, by_output, rtol=0, atol=1e-5)
    assert (by_value - base).abs().max() > 1e-4


@pytest.mark.parametrize("name", tiny.MODELS)
def test_silencing_an_up_channel_is_silencing_its_down_column(name):
    by_up, by_down = logits(name, {"up": [3, 20]}), logits(name, {"down": [3, 20]})
    torch.testing.assert_close(by_up, by_down, rtol=0, atol=1e-5)
    assert (by_up - logits(name, {})).abs().max() > 1e-4


@pytest.mark.parametrize("name", [n for n in tiny.MODELS if "gate" in describe(tiny.build(n))[0].projections])
def test_gate_channels(name):
    torch.testing.assert_close(logits(name, {"gate": [0, 7]}), logits(name, {"down": [0, 7]}), rtol=0, atol=1e-5)


# A norm over all heads (OLMo-2) and DeBERTa's position terms couple the heads, so the test below is not true of them.
@pytest.mark.parametrize("name", [n for n in tiny.MODELS if "olmo" not in n and "deberta" not in n])
def test_silencing_a_key_head_is_silencing_its_query_heads(name):
    """Without keys, or without queries, attention of those heads is uniform."""
    projections = describe(tiny.build(name))[0].projections
    queries, groups = projections["q"].units, projections["k"].units
    heads = list(range(queries // groups))
    torch.testing.assert_close(logits(name, {"k": [0]}), logits(name, {"q": heads}), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_owners_inverts_index(name):
    for projection in describe(tiny.build(name))[1].projections.values():
        units = torch.tensor([0, projection.units - 1]).unique()
        assert torch.equal(projection.owners(projection.index(units)), units)


def test_roles_of_a_fused_weight_do_not_overlap():
    for name in ("fused_phi3", "transposed_gpt2", "interleaved_neox", "deberta"):
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
    with pytest.raises(ValueError, match="5 heads of 8"):
        describe(model)
