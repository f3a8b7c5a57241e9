"""What an adapter cannot restore is known to it: fresh heads, other frozen weights, ties."""

import json
import warnings

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model

from intaglio import ID3, S2FT, AdapterPool, Delta, Full, Random, attach
from intaglio.adapter.folder import CONFIG
from intaglio.adapter.rest import Rest
from intaglio.hf import S2FTConfig
from intaglio.runtime.store import AdapterStore
from support import tiny

NAME = "gqa_llama"


def delta_of(method, model=None, **kwargs):
    """A Delta whose values all differ from the base's."""
    tuner = attach(model or tiny.build(NAME), method, **kwargs)
    with torch.no_grad():
        for slot in tuner.slots:
            slot.values.add_(0.25)
    tuner.slots.write()
    delta = tuner.delta()
    tuner.detach()
    return delta


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base on the disk, so that transformers says what it has loaded."""
    path = tmp_path_factory.mktemp("base")
    tiny.build(NAME).save_pretrained(path)
    return path


def classifier(folder, seed):
    torch.manual_seed(seed)
    return tf.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)


@pytest.mark.parametrize("method", [S2FT(o=0.5, down=0.25), Random(budget=0.05), ID3(budget=50, steps=2)])
def test_a_fresh_head_is_trained_whole_or_refused(folder, method):
    with pytest.raises(ValueError, match=r"score\.weight: was not in the checkpoint but drawn at random"):
        attach(classifier(folder, 0), method)


def test_a_fresh_head_that_is_trained_whole_replaces_any_other(folder):
    model = classifier(folder, 0)
    delta = delta_of(ID3(budget=50, steps=2, whole=("score*",)), model)
    other = classifier(folder, 1)
    delta.apply_(other)
    assert torch.equal(other.score.weight, model.score.weight)
    delta.revert_(other)


def test_a_head_that_is_in_the_checkpoint_is_part_of_the_base(folder, tmp_path):
    classifier(folder, 0).save_pretrained(tmp_path / "whole")
    base = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    delta = delta_of(S2FT(o=0.5, down=0.25), base)
    delta.apply_(tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole"))
    again = delta_of(S2FT(o=0.5, down=0.25), tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole"))
    with pytest.raises(ValueError, match=r"score\.weight: base fingerprint"):
        again.apply_(classifier(folder, 1))


DOORS = {
    "delta": lambda model, path: Delta.load(path).apply_(model),
    "pool": lambda model, path: AdapterPool(model).load("a", Delta.load(path)),
    "server": lambda model, path: AdapterStore(model).load("a", path),
    "peft": lambda model, path: PeftModel.from_pretrained(model, path),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("changed", ["model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"])
def test_a_base_with_other_frozen_weights_is_refused(tmp_path, door, changed):
    path = delta_of(S2FT(o=0.5, down=0.25)).save(tmp_path / "adapter")
    DOORS[door](tiny.build(NAME), path)
    other = tiny.build(NAME)
    with torch.no_grad():
        other.get_parameter(changed).view(-1)[-1] += 1.0  # the end is always looked at
    before = {name: p.clone() for name, p in other.state_dict().items()}
    with pytest.raises(ValueError, match=rf"{changed}: base fingerprint .* expected"):
        DOORS[door](other, path)
    assert all(torch.equal(before[name], p) for name, p in other.state_dict().items())


def test_adapters_that_do_not_touch_stand_together():
    """Each was trained on the bare base; neither is taken for another base when it comes second."""
    first = delta_of(S2FT(o=0.5, down=None))
    second = delta_of(S2FT(o=None, down=0.5), exclude=first.selection)
    for one, two in ((first, second), (second, first)):
        model = tiny.build(NAME)
        one.apply_(model)
        two.apply_(model)
        two.revert_(model)
        one.revert_(model)
    pool = AdapterPool(tiny.build(NAME))
    pool.load("first", first)
    pool.use("first")
    pool.load("second", second)


def test_a_whole_tensor_needs_nothing_of_what_it_replaces():
    delta = delta_of(Full())
    other = tiny.build(NAME, seed=7)
    delta.apply_(other)
    assert all(torch.equal(p, delta.values[name]) for name, p in other.named_parameters())


def tied(flag, seed=0):
    torch.manual_seed(seed)
    fields = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**fields, tie_word_embeddings=flag))


def untied():
    """The same weights, of which the head stands alone."""
    source, model = tied(True), tied(False)
    model.load_state_dict(source.state_dict())
    return model


@pytest.mark.parametrize("door", ["delta", "pool", "peft"])
def test_ties_are_the_bases(tmp_path, door):
    method = Random(budget=50, include=("*embed*",))
    path = delta_of(method, tied(True)).save(tmp_path / "tied")
    DOORS[door](tied(True), path)
    with pytest.raises(ValueError, match="tie_word_embeddings=True"):
        DOORS[door](untied(), path)
    path = delta_of(method, untied()).save(tmp_path / "untied")
    DOORS[door](untied(), path)
    with pytest.raises(ValueError, match="tie_word_embeddings=False"):
        DOORS[door](tied(True), path)


def test_a_peft_model_knows_its_base_too(tmp_path):
    model = get_peft_model(tiny.build(NAME), S2FTConfig(o=0.5, down=0.25))
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "import intaglio.hf" in card
    PeftModel.from_pretrained(tiny.build(NAME), tmp_path)
    other = tiny.build(NAME)
    with torch.no_grad():
        other.model.norm.weight.add_(1.0)
    with pytest.raises(ValueError, match=r"norm\.weight: base fingerprint"):
        PeftModel.from_pretrained(other, tmp_path)
    (tmp_path / "README.md").write_text("my own words")
    model.save_pretrained(tmp_path)
    # PEFT adds its front matter to a card that is there; the words stay.
    assert "my own words" in (tmp_path / "README.md").read_text()


def test_an_adapter_of_an_older_release_says_nothing_of_the_rest(tmp_path):
    path = delta_of(S2FT(o=0.5, down=0.25)).save(tmp_path / "adapter")
    config = json.loads((path / CONFIG).read_text())
    del config["rest"]
    (path / CONFIG).write_text(json.dumps(config))
    delta = Delta.load(path)
    assert delta.rest is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delta.apply_(tiny.build(NAME))


@pytest.mark.parametrize("rest", [[], {"frozen": []}, {"frozen": {}, "tied": 3}, {"frozen": {"a": 1}, "tied": []}])
def test_a_damaged_rest_is_refused(rest):
    with pytest.raises(ValueError, match="damaged adapter: rest"):
        Rest.parse(rest)
