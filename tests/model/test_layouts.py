"""What lies around the layers: several stacks in one model, towers that read no text, and layers that cannot be read."""

import peft
import pytest
import torch
import transformers as tf
from torch import nn

from intaglio import S2FT, Batches, Random, attach
from intaglio.model import layer_reading
from intaglio.model.families import FAMILIES
from intaglio.model.structure import describe
from support import tiny
from support.layouts import CHANNELS


@pytest.mark.parametrize("name", CHANNELS)
def test_channels_are_trained_where_heads_are_unknown(name):
    """The thin gradient is the dense one, and nothing but FFN weights is chosen."""
    model, dense = tiny.build(name), tiny.build(name)
    tuner = attach(model, S2FT(o=None, up=0.2, down=0.2))
    model(**tiny.batch(name)).loss.backward()
    dense(**tiny.batch(name)).loss.backward()
    for slot in tuner.slots:
        expected = tuner.selection[slot.name].gather(dense.get_parameter(slot.name).grad)
        torch.testing.assert_close(slot.values.grad, expected, rtol=1e-4, atol=1e-6)
    assert len({slot.name for slot in tuner.slots}) >= 2


@pytest.mark.parametrize("name", [n for n, build in CHANNELS.items() if n != "nemotron_h"])
def test_permuted_channels_where_heads_are_unknown(name):
    model, batch = tiny.build(name), tiny.batch(name)
    before = model(**batch).logits
    tuner = attach(model, S2FT(o=None, up=0.2, down=0.2), permute=True)
    torch.testing.assert_close(model(**batch).logits, before, rtol=0, atol=1e-5)
    tuner.detach()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), tiny.build(name).parameters(), strict=True))


def test_each_stack_has_its_own_heads():
    """BART's decoder has two heads of 16 where its encoder has four of 8; the attention between them stays frozen."""
    layers = describe(tiny.build("bart"))
    assert [(layer.projections["o"].units, layer.projections["o"].width) for layer in layers] == [(4, 8)] * 2 + [(2, 16)] * 2
    assert [layer.projections["down"].units for layer in layers] == [48, 48, 40, 40]
    assert layers[2].projections["q"].parameter == "model.decoder.layers.0.self_attn.q_proj.weight"


def test_each_layer_has_its_own_widths():
    """Gemma 4: heads of 8 in sliding, of 16 in full attention."""
    widths = [{layer.projections[role].width for role in "qkvo"} for layer in describe(tiny.build("widths_gemma4"))]
    assert widths == [{8}, {16}]


@pytest.mark.parametrize("name", ["widths_gemma4", "gemma4_moe"])
def test_units_of_several_sizes_are_chosen_whole(name):
    """Every chosen slice is all of a head, in every layer."""
    model = tiny.build(name)
    chosen = attach(model, S2FT(o=0.5, down=None)).selection
    for layer in describe(model):
        projection = layer.projections["o"]
        index = chosen[projection.parameter].index
        assert torch.equal(projection.index(projection.owners(index)), index)
        assert len(index) == 2 * projection.width


def llava():
    vision = tf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    text = tf.LlamaConfig(**tiny.LLAMA, num_key_value_heads=2)
    return tf.LlavaForConditionalGeneration(tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=95))


def whisper():
    return tf.WhisperModel(
        tf.WhisperConfig(
            vocab_size=96, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=2,
            encoder_ffn_dim=48, decoder_ffn_dim=40, num_mel_bins=8, max_source_positions=16, max_target_positions=32,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )
    )  # fmt: skip


def test_the_tower_that_reads_images_is_left_out():
    """Of a model for text; a tower alone, and a model that hears, are described whole."""
    model = llava()
    assert {layer.name.rpartition(".")[0] for layer in describe(model)} == {"model.language_model.layers"}
    tower = describe(model.model.vision_tower)
    assert [layer.projections["o"].units for layer in tower] == [4, 4]
    assert [layer.projections["o"].units for layer in describe(whisper())] == [4, 2]


@pytest.mark.parametrize("build", [lambda: vit(), lambda: whisper()], ids=["vit", "whisper"])
def test_what_reads_more_than_token_ids_needs_a_probe(build):
    with pytest.raises(ValueError, match=r"permute=True: \w+ .*reads more than token ids.*give attach a probe"):
        attach(build(), S2FT(o=0.5, down=0.25), permute=True)


def vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return tf.ViTModel(tf.ViTConfig(**sizes, image_size=16, patch_size=8)).eval()


def test_a_model_of_images_alone():
    model, batch = vit(), {"pixel_values": torch.randn(2, 3, 16, 16)}
    before = model(**batch)[0]
    tuner = attach(model, S2FT(v=0.5, o=0.5, up=0.25, down=0.25), permute=True, probe=Batches([batch]))
    assert not torch.equal(model.layers[0].mlp.fc2.weight, vit().layers[0].mlp.fc2.weight)
    torch.testing.assert_close(model(**batch)[0], before, rtol=0, atol=1e-5)
    tuner.detach()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), vit().parameters(), strict=True))


def read(model):
    try:
        return describe(model)
    except ValueError as error:
        return str(error)


@pytest.fixture(scope="module")
def models():
    wrapped = peft.get_peft_model(tiny.build("nemotron"), peft.LoraConfig(target_modules=["up_proj"]))  # no nn.Linear any more
    return [*(tiny.build(name) for name in tiny.DESCRIBED | CHANNELS), vit(), wrapped]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_row_is_needed(monkeypatch, models, family):
    """Without it some tiny model is read otherwise: rows that no test reaches would be hopes."""
    monkeypatch.setattr(layer_reading, "FAMILIES", [other for other in FAMILIES if other is not family])
    without = [read(model) for model in models]
    monkeypatch.undo()
    assert any(read(model) != other for model, other in zip(models, without, strict=True))


class UnknownExperts(nn.Module):
    """A mixture that no row describes, with a shared expert that looks like an FFN."""

    def __init__(self):
        super().__init__()
        self.bank = nn.Parameter(torch.randn(3, 32, 7))
        self.shared = tiny.build("mha_llama").model.layers[0].mlp


def with_unknown_experts():
    model = tiny.build("mha_llama")
    model.model.layers[1].mlp = UnknownExperts()
    return model


def with_listed_experts():
    model = tiny.build("mha_llama")
    model.model.layers[1].mlp = nn.ModuleList(tiny.build("mha_llama").model.layers[0].mlp for _ in range(3))
    return model


def without_decoder_ffn():
    model = tiny.build("bart")
    for layer in model.model.decoder.layers:
        layer.fc1 = nn.Identity()
    return model


@pytest.mark.parametrize(
    ("build", "layer"),
    [
        (with_unknown_experts, "model.layers.1"),
        (with_listed_experts, "model.layers.1"),
        (without_decoder_ffn, "model.decoder.layers.0"),
    ],
)
def test_layers_that_cannot_be_read_are_refused_by_name(build, layer):
    """Also where the other layers, or the other stack, could be: nothing is passed over."""
    model = build()
    with pytest.raises(ValueError, match=rf"{layer} is not built like.*its FFN cannot be found.*no structure.*still work"):
        attach(model, S2FT(o=None, down=0.1))
    assert attach(model, Random(budget=0.01)).selection.size


@pytest.mark.parametrize(("attribute", "value"), [("is_concatenated", False), ("is_transposed", True)])
def test_experts_that_say_how_they_are_stored(attribute, value):
    """Sizes alone do not tell gate and up in turn from gate after up; transformers' experts do."""
    model = tiny.build("mixtral")
    for layer in model.model.layers:
        setattr(layer.mlp.experts, attribute, value)
    with pytest.raises(ValueError, match=r"no stack|cannot be found"):
        describe(model)


def test_latent_attention_without_a_low_rank_of_queries():
    """DeepSeek-V2-Lite: a head's query rows, then of `kv_b_proj` the rows of its key and those of its value."""
    projections = describe(tiny.build("deepseek_v2_lite"))[0].projections
    assert projections["q"].parameter.endswith("q_proj.weight")
    assert (projections["q"].width, projections["k"].width, projections["v"].width) == (12, 8, 8)
    assert projections["v"].index(torch.tensor([1])).tolist() == list(range(24, 32))
