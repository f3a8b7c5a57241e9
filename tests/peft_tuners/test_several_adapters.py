"""Several adapters on one base: merged, switched, side by side in one batch, together."""

import copy

import pytest
import torch
from peft import get_peft_model

from intaglio import attach
from intaglio.core.probe import Batches
from intaglio.hf import DeltaConfig, S2FTConfig
from intaglio.methods import build
from support import tiny
from support.peft_models import BF16, FP32, RANDOM, S2FT, logits, refuses, same, train, trained


@pytest.mark.parametrize("config", [S2FTConfig(**S2FT), DeltaConfig(method=RANDOM)], ids=["s2ft", "random"])
def test_merging_100_times_in_bf16_leaves_the_base_as_it_was(config):
    """S2FT checklist 17: values are swapped, never added: merged and unmerged 100 times, every bit comes back."""
    name = "tied_llama"
    model = trained(copy.deepcopy(config), name, BF16)
    base, tuned = tiny.build(name, dtype=BF16), None
    for _ in range(100):
        model.merge_adapter()
        tuned = logits(model, name) if tuned is None else tuned
        assert torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)
        model.unmerge_adapter()
    assert not torch.equal(tuned, logits(base, name))
    assert same(model.unload(), base)


def three_adapters(name, dtype=FP32):
    """Adapters of unequal size: columns of o and down, rows of v as well, single entries."""
    model = trained(S2FTConfig(**S2FT), name, dtype)
    model.add_adapter("rows", S2FTConfig(o=None, down=0.5, v=0.5, up=0.2, seed=1))
    model.add_adapter("entries", DeltaConfig(method=RANDOM))
    for position, adapter in enumerate(("rows", "entries")):
        model.set_adapter(adapter)
        train(model, name, seed=20 * position)
    return model.eval()


@pytest.mark.parametrize("name", ["gqa_llama", "tied_llama", "transposed_gpt2"])
def test_mixed_batches_equal_each_adapter_merged(name):
    """S2FT checklist 18: fp32, to 1e-5, with adapters of unequal size and a row without any."""
    model = three_adapters(name)
    names = ["rows", "__base__", "default", "entries", "rows"]
    batch = {key: t[:, :12] for key, t in tiny.batch(name, rows=5, seed=9).items()}
    with torch.no_grad():
        mixed = model(**batch, adapter_names=names).logits
        for row, adapter in enumerate(names):
            if adapter != "__base__":
                model.set_adapter(adapter)
                model.merge_adapter()
            alone = (
                model.get_base_model()(**batch).logits[row] if adapter != "__base__" else tiny.build(name)(**batch).logits[row]
            )
            assert (mixed[row] - alone).abs().max() < 1e-5
            if adapter != "__base__":
                model.unmerge_adapter()


def test_mixed_batches_generate_with_beams():
    model = three_adapters("gqa_llama")
    ids = tiny.batch("gqa_llama", rows=2)["input_ids"]
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    mixed = model.generate(input_ids=ids, adapter_names=["entries", "__base__"], **options)
    model.set_adapter("entries")
    assert torch.equal(mixed[0], model.generate(input_ids=ids, **options)[0])
    with model.disable_adapter():
        assert torch.equal(mixed[1], model.generate(input_ids=ids, **options)[1])


def test_mixed_batches_are_refused_where_they_cannot_be_right():
    model = three_adapters("gqa_llama")
    for names, message in ((["default", "nobody", "rows"], "nobody"), (["default"], "cannot be told apart")):
        with refuses(message):
            logits(model, adapter_names=names)
    names = ["default", "__base__", "rows"]
    with refuses("training mode"):
        logits(model.train(), adapter_names=names)
    model.eval().merge_adapter()
    with refuses("unmerge_adapter"):
        logits(model, adapter_names=names)
    names = ["default", "__base__", "default"]
    experts = get_peft_model(tiny.build("mixtral"), DeltaConfig(method={"name": "full", "include": ("*experts*",)})).eval()
    with refuses("experts.*one adapter at a time"):
        logits(experts, "mixtral", adapter_names=names)
    flat = get_peft_model(tiny.build("opt"), S2FTConfig(**S2FT)).eval()
    with refuses("fc2.*one adapter at a time"):
        logits(flat, "opt", adapter_names=names)


def test_several_adapters_switch_disable_and_go():
    model = three_adapters("gqa_llama")
    base, outputs = logits(tiny.build("gqa_llama")), {}
    for adapter in ("default", "rows", "entries"):
        model.set_adapter(adapter)
        outputs[adapter] = logits(model)
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), outputs[adapter])
        assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {adapter}
    assert not torch.equal(outputs["default"], outputs["rows"])
    status = model.get_model_status()
    assert (status.enabled, set(status.peft_types.values())) == (True, {"INTAGLIO"})
    model.set_adapter("default")
    model.delete_adapter("rows")
    assert torch.equal(logits(model), outputs["default"])
    assert not any("rows" in key for key in model.state_dict())
    with refuses("does not exist"):
        model.delete_adapter("rows")


def test_disjoint_adapters_act_together_and_overlapping_ones_are_refused():
    model = trained(S2FTConfig(**S2FT))
    model.add_adapter("twin", S2FTConfig(**S2FT))
    model.add_adapter("other", S2FTConfig(**S2FT, exclude=model.peft_config["default"].chosen))
    model.set_adapter("other")
    train(model, seed=5)
    model.base_model.set_adapter(["default", "other"])
    together = logits(model)
    model.merge_adapter()
    assert (logits(model) - together).abs().max() < 1e-5
    model.unmerge_adapter()
    assert same(copy.deepcopy(model).unload(), tiny.build("gqa_llama"))
    model.base_model.set_adapter(["default", "twin"])
    for use in (lambda: logits(model), model.merge_adapter):
        with refuses("'default' and 'twin' both replace entries"):
            use()


def test_the_choice_may_look_at_data_and_is_made_once():
    class Once(Batches):
        reads = 0

        def batches(self):
            Once.reads += 1
            return super().batches()

    config = S2FTConfig(**S2FT, select="activation", probe=Once([tiny.batch("gqa_llama")]))
    model = get_peft_model(tiny.build("gqa_llama"), config)
    chosen = attach(tiny.build("gqa_llama"), build(config.method), probe=Batches([tiny.batch("gqa_llama")])).selection
    assert config.chosen == chosen
    reads = Once.reads
    model.add_adapter("copy", config)
    assert Once.reads == reads > 0
