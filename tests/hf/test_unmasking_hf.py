"""Entries chosen while training, in the Trainer and on PEFT's adapters."""

import json
import warnings

import pytest
import safetensors.torch
import torch
import transformers as tf
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

from intaglio import ID3, Delta, StaticGradient, Updates, attach
from intaglio.hf.checkpoint import load_tuner_state, save_tuner_state
from intaglio.hf.trainer import SparseMixin, optimizer_cls_and_kwargs
from support import tiny

NAME = "tied_llama"
PEFT = {
    "lora": LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    "dora": LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True, task_type="CAUSAL_LM"),
    "ia3": IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "head": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
}


class SparseHFTrainer(SparseMixin, tf.Trainer):
    pass


def arguments(folder, **settings):
    common = {
        "output_dir": str(folder), "max_steps": 10, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "use_cpu": True,
        "weight_decay": 0.1, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    return tf.TrainingArguments(**(common | settings))


def rows(n=40):
    batch = tiny.batch(NAME, rows=n)
    return [{key: tensor[i] for key, tensor in batch.items()} for i in range(n)]


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if not name.startswith("intaglio")}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def loop(model, tuner, steps, **kwargs):
    optimizer = tuner.optimizer(torch.optim.AdamW, **({"lr": 1e-2} | kwargs))
    for step in range(steps):
        model(**tiny.batch(NAME, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_the_trainer_gives_the_length_and_logs_the_count(tmp_path):
    tuner = attach(tiny.build(NAME), ID3(budget=1003))
    trainer = SparseHFTrainer(tuner, args=arguments(tmp_path), train_dataset=rows())
    trainer.train()
    assert tuner.method == ID3(budget=1003, steps=10)
    assert [row["unmasked"] for row in trainer.state.log_history if "loss" in row] == [1003 * t // 10 for t in range(1, 11)]
    assert tuner.delta().method["steps"] == 10


def test_mixin_and_factory_train_alike(tmp_path):
    """One trains through a subclass, the other through `optimizer_cls_and_kwargs`: weight decay spares norms in both."""
    results = []
    for mixed in (True, False):
        tuner = attach(tiny.build(NAME), ID3(budget=1003, steps=10))
        options = {"args": arguments(tmp_path, lr_scheduler_type="constant"), "train_dataset": rows()}
        if mixed:
            trainer = SparseHFTrainer(tuner, **options)
        else:
            factory = optimizer_cls_and_kwargs(tuner, lr=1e-2, fused=True)  # as the Trainer does by default
            trainer = tf.Trainer(model=tuner.model, optimizer_cls_and_kwargs=factory, **options)
        trainer.train()
        decayed = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
        norms = [slot for slot in tuner.slots if "norm" in slot.name]
        assert norms
        assert all(decayed[id(slot.values)] == (0.0 if "norm" in slot.name else 0.1) for slot in tuner.slots)
        assert tuner.selection.size == 1003
        results.append(weights(tuner.detach()))
    assert same(*results)


def test_passes_that_add_up_must_be_announced(tmp_path):
    tuner = attach(tiny.build(NAME), ID3(budget=100))
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=4: say how .*'exact'.*'lean'"):
        SparseHFTrainer(tuner, args=arguments(tmp_path, gradient_accumulation_steps=4), train_dataset=rows())


@pytest.mark.parametrize("mode", ["exact", "lean"])
def test_accumulation_in_the_trainer_is_that_of_a_loop(tmp_path, mode):
    data = rows()

    def begin():
        return attach(tiny.build(NAME), ID3(budget=400, steps=5), updates=Updates(accumulation=mode))

    tuner, args = begin(), arguments(tmp_path, gradient_accumulation_steps=2, max_steps=5, lr_scheduler_type="constant")
    trainer = SparseHFTrainer(tuner, args=args, train_dataset=data)
    seen = []
    compute = trainer.training_step
    trainer.training_step = lambda model, inputs, *rest: (seen.append(inputs), compute(model, inputs, *rest))[1]
    trainer.train()
    plain = begin()
    optimizer = plain.optimizer(torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.1
    norms = [slot.values for slot in plain.slots if "norm" in slot.name]
    kept = [p for p in optimizer.param_groups[0]["params"] if all(p is not norm for norm in norms)]
    optimizer.param_groups[0]["params"] = kept
    optimizer.add_param_group({"params": norms, "weight_decay": 0.0})
    for pair in zip(seen[::2], seen[1::2], strict=True):
        tokens = sum(int((inputs["labels"][:, 1:] != -100).sum()) for inputs in pair)
        for inputs in pair:
            plain.model.train()
            plain.model(**inputs, num_items_in_batch=torch.tensor(tokens)).loss.backward()
        plain.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert plain.selection == tuner.selection
    one, two = weights(tuner.detach()), weights(plain.detach())
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


def test_the_best_checkpoint_comes_back_whole(tmp_path):
    """Later entries go back to the base's values, bit for bit."""
    tuner = attach(tiny.build(NAME, dtype=torch.bfloat16), ID3(budget=1003))
    settings = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 5}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = SparseHFTrainer(
        tuner, args=arguments(tmp_path, learning_rate=0.05, **settings), train_dataset=rows(), eval_dataset=rows(4)
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-5")
    assert tuner.selection.size == 501
    fresh = tiny.build(NAME, dtype=torch.bfloat16)
    Delta.load(trainer.state.best_model_checkpoint).apply_(fresh)
    assert same(weights(fresh), weights(tuner.detach()))


def test_checkpoints_are_of_the_budgets_size(tmp_path):
    """ID3 checklist 13: 20 bytes of ours per entry, 8 of AdamW, none per weight."""
    tuner = attach(tiny.build(NAME), ID3(budget=1000, steps=4))
    optimizer = loop(tuner.model, tuner, 4)
    save_tuner_state(tuner, tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "tuner_state.safetensors")
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == 1000 * (4 + 4 + 4 + 4)  # index, value, base, born
    state = optimizer.state_dict()["state"].values()
    assert sum(t.numel() * t.element_size() for s in state for k, t in s.items() if k != "step") == 8 * 1000


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"budget": 101}, "id3.budget"), ({"steps": 9}, "id3.steps"), ({"exponent": 2.0}, "id3.exponent"),
        ({"eps": 0.5}, "id3.eps"),
        ({"exclude": ("*norm*",)}, "id3.exclude"), ({"updates": Updates(decay="start")}, "updates.decay"),
    ],
)  # fmt: skip
def test_resume_under_other_conditions_is_refused(tmp_path, change, named):
    """ID3 checklist 22: another budget, exponent, eps, `Updates`, tensor list or base: refused by name, nothing changed."""
    fields = {"budget": 100, "steps": 8}
    tuner = attach(tiny.build(NAME), ID3(**fields))
    loop(tuner.model, tuner, 3)
    save_tuner_state(tuner, tmp_path)
    updates = change.pop("updates", None)
    other = attach(tiny.build(NAME), ID3(**(fields | change)), updates=updates)
    before = weights(other.model)
    with pytest.raises(ValueError, match=f"resume: the checkpoint's {named} is"):
        load_tuner_state(other, tmp_path)
    with pytest.raises(ValueError, match="another base model"):
        load_tuner_state(attach(tiny.build(NAME, seed=1), ID3(**fields)), tmp_path)
    with pytest.raises(ValueError, match="list of candidates"):
        load_tuner_state(attach(tiny.build("gqa_llama"), ID3(**fields)), tmp_path)
    assert same(before, weights(other.model))
    assert other.step == 0


def test_a_run_of_another_length_is_refused(tmp_path):
    """The checkpoint was made for 10 updates; a longer run would grant the budget otherwise."""
    tuner = attach(tiny.build(NAME), ID3(budget=100))
    SparseHFTrainer(tuner, args=arguments(tmp_path, save_strategy="steps", save_steps=5), train_dataset=rows()).train()
    again = attach(tiny.build(NAME), ID3(budget=100))
    trainer = SparseHFTrainer(again, args=arguments(tmp_path, max_steps=20), train_dataset=rows())
    with pytest.raises(ValueError, match=r"steps=10: this run makes 20 updates"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


@pytest.mark.parametrize("kind", PEFT)
def test_a_peft_adapter_is_sparsified_and_stays_an_ordinary_one(tmp_path, kind):
    """ID3 checklist 28: only chosen entries of the adapter's tensors move; the folder is complete and PEFT's own."""
    torch.manual_seed(0)
    model = get_peft_model(tiny.build("gqa_llama"), PEFT[kind])
    start, trainable = weights(model), {name for name, p in model.named_parameters() if p.requires_grad}
    tuner = attach(model, ID3(budget=0.2, steps=6))
    loop(model, tuner, 6, weight_decay=0.1)
    assert set(tuner.selection) <= trainable
    assert tuner.selection.size == round(0.2 * sum(start[name].numel() for name in trainable))
    after = weights(model)
    moved = {name: (after[name] != start[name]).flatten().nonzero().flatten() for name in start}
    assert {name for name, index in moved.items() if index.numel()} == set(tuner.selection)
    assert all(torch.equal(moved[name], entries.flat()) for name, entries in tuner.selection.items())
    tuner.save(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["peft_type"] == PEFT[kind].peft_type.value
    tuned = tuner.detach()
    assert {name for name, p in tuned.named_parameters() if p.requires_grad} == trainable
    loaded = PeftModel.from_pretrained(tiny.build("gqa_llama"), tmp_path / "adapter").eval()
    batch = tiny.batch("gqa_llama", seed=9)
    assert torch.equal(loaded(**batch).logits, tuned.eval()(**batch).logits)


def test_lora_starts_at_b_and_pools_give_a_its_share():
    """ID3 checklist 28: A's first gradient is zero, as B starts at zero; with separate budgets A is trained too."""

    def shares(method, steps):
        torch.manual_seed(0)
        model = get_peft_model(tiny.build("gqa_llama"), PEFT["lora"])
        tuner = attach(model, method)
        loop(model, tuner, steps)
        of = {part: sum(e.count for name, e in tuner.selection.items() if part in name) for part in ("lora_A", "lora_B")}
        sizes = {part: sum(p.numel() for n, p in model.named_parameters() if part in n and "intaglio" not in n) for part in of}
        return of, sizes

    first, _ = shares(ID3(budget=200, steps=10), 1)
    assert first == {"lora_A": 0, "lora_B": 20}
    pooled, _ = shares(ID3(budget=200, steps=10), 10)
    apart, sizes = shares(ID3(budget=200, steps=10, pools=("*lora_A*", "*lora_B*")), 10)
    assert sum(apart.values()) == 200 == sum(pooled.values())
    assert abs(apart["lora_A"] - 200 * sizes["lora_A"] / sum(sizes.values())) < 1
    assert pooled["lora_A"] < apart["lora_A"]


def test_a_frozen_adapter_is_refused(tmp_path):
    """PEFT loads adapters for inference, all frozen; the base must not be trained in their place."""
    get_peft_model(tiny.build(NAME), PEFT["lora"]).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny.build(NAME), str(tmp_path))
    with pytest.raises(ValueError, match="is_trainable=True"):
        attach(model, ID3(budget=10))
    attach(PeftModel.from_pretrained(tiny.build(NAME), str(tmp_path), is_trainable=True), ID3(budget=10))


def test_an_adapter_of_any_name_is_saved_and_resumed(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(tiny.build(NAME), PEFT["lora"], adapter_name="math")
    tuner = attach(model, ID3(budget=100, steps=2))
    loop(model, tuner, 2)
    tuner.save(tmp_path / "adapter")
    save_tuner_state(tuner, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny.build(NAME), str(tmp_path / "adapter"))
    batch = tiny.batch(NAME)
    assert torch.equal(loaded.eval()(**batch).logits, model.eval()(**batch).logits)
    other = attach(get_peft_model(tiny.build(NAME), PEFT["lora"], adapter_name="math"), ID3(budget=100, steps=2))
    load_tuner_state(other, tmp_path / "adapter")
    assert same(weights(other.model), weights(model))


def test_a_refused_resume_changes_no_adapter(tmp_path):
    torch.manual_seed(0)
    tuner = attach(get_peft_model(tiny.build(NAME), PEFT["lora"]), ID3(budget=100, steps=2))
    loop(tuner.model, tuner, 1)
    tuner.save(tmp_path / "adapter")
    save_tuner_state(tuner, tmp_path / "adapter")
    other = attach(get_peft_model(tiny.build(NAME), PEFT["lora"]), ID3(budget=101, steps=2))
    before = weights(other.model)
    with pytest.raises(ValueError, match=r"id3\.budget is 100"):
        load_tuner_state(other, tmp_path / "adapter")
    assert same(weights(other.model), before)


def test_adafactor_through_the_factory():
    """The factory makes a class of another name, and tensors without a chosen entry have no mean square."""
    tuner = attach(tiny.build(NAME), ID3(budget=20, steps=4))
    cls, kwargs = optimizer_cls_and_kwargs(tuner, torch.optim.Adafactor, lr=1e-2)
    optimizer = cls([{"params": list(tuner.model.parameters())}], **kwargs)
    for step in range(4):
        tuner.model(**tiny.batch(NAME, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert tuner.unmasking.chosen == 20


def test_a_quantized_base_is_refused_but_not_its_lora():
    """ID3 checklist 35: with PyTorch's dynamic quantization; its packed layers have no gradient to choose by."""
    model = tiny.build("gqa_llama")
    model.lm_head.qconfig = torch.ao.quantization.default_dynamic_qconfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch's own: it will drop this way of quantizing
        model.lm_head = torch.ao.nn.quantized.dynamic.Linear.from_float(model.lm_head)
    with pytest.raises(ValueError, match=r"lm_head.*quantized.*LoRA"):
        attach(model, StaticGradient(budget=100))
    lora = get_peft_model(model, PEFT["lora"])
    tuner = attach(lora, StaticGradient(budget=50))
    assert tuner.unmasking.slots
    assert all("lora_" in name for name in tuner.unmasking.slots)
