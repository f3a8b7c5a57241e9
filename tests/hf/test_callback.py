"""Layers in turn by a callback, in a Trainer that knows nothing of them."""

import pytest
import torch
import transformers as tf

from intaglio import IST, LISA, RST, S2FT, Batches, attach
from intaglio.hf import ISTCallback
from intaglio.hf.trainer import SparseMixin
from support import tiny
from support.layers import NAME, adapted, probe


def trainer(folder, callback, model=None, **settings):
    common = {
        "output_dir": str(folder), "max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True,
        "weight_decay": 0.1, "logging_steps": 4, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    batch = tiny.batch(NAME, rows=40)
    rows = [{key: tensor[i] for key, tensor in batch.items()} for i in range(40)]
    callbacks = [] if callback is None else [callback]
    args = tf.TrainingArguments(**(common | settings))
    return tf.Trainer(model=adapted() if model is None else model, args=args, train_dataset=rows, callbacks=callbacks)


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def test_only_the_drawn_layers_move_at_each_update(tmp_path):
    """Every adapter tensor is in the optimizer, idle ones keep every bit under weight decay and momentum."""
    callback, seen = ISTCallback(IST(layers=2, interval=4)), []

    class Watch(tf.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            names = {id(p): name for name, p in run.model.named_parameters()}
            self.held = {names[id(p)] for group in kwargs["optimizer"].param_groups for p in group["params"]}

        def on_step_begin(self, args, state, control, **kwargs):
            self.before, self.active = trained(run.model), list(callback.rotation.active)

        def on_step_end(self, args, state, control, **kwargs):
            moved = [name for name, p in trained(run.model).items() if not torch.equal(p, self.before[name])]
            layers = {int(name.split("layers.")[1].split(".")[0]) for name in moved}
            seen.append((sorted(layers), self.active))

    run = trainer(tmp_path, callback, gradient_accumulation_steps=2)
    watch = Watch()
    run.add_callback(watch)
    run.train()
    assert watch.held == set(trained(run.model))
    assert len(seen) == 12
    assert all(moved == active for moved, active in seen)
    assert callback.rotation.probes == 3
    assert sum(callback.rotation.visits) == 24
    assert all(p.requires_grad for name, p in run.model.named_parameters() if "lora_" in name)
    assert any("probe_seconds" in line for line in run.state.log_history)


def test_all_layers_active_is_the_run_without_a_callback(tmp_path):
    """Probes draw nothing from the global generators and leave nothing behind; dropout is on."""
    results = []
    for callback in (None, ISTCallback(IST(layers=1.0, interval=2), probe=probe())):
        run = trainer(tmp_path, callback)
        run.train()
        results.append(trained(run.model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("restore", [False, True])
def test_resume_is_exact(tmp_path, restore):
    """From `trainer_state.json`, whether or not the Trainer restores callbacks by itself."""
    first = ISTCallback(IST(layers=2, interval=3))
    run = trainer(tmp_path, first, save_strategy="steps", save_steps=5)
    run.train()
    torch.manual_seed(5)
    second = ISTCallback(IST(layers=2, interval=3))
    again = trainer(tmp_path, second, restore_callback_states_from_checkpoint=restore)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    used = next(c for c in again.callback_handler.callbacks if isinstance(c, ISTCallback))
    assert used.rotation.state() == first.rotation.state()
    one, two = trained(run.model), trained(again.model)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_resume_is_exact_with_trained_norms(tmp_path):
    """They are damped toward where they started, which no checkpoint holds: it is seen before one is loaded."""

    def build():
        return adapted(modules_to_save=["input_layernorm"])

    def state(model):
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    first = ISTCallback(IST(layers=2, interval=2))
    run = trainer(tmp_path, first, build(), save_strategy="steps", save_steps=5)
    run.train()
    second = ISTCallback(IST(layers=2, interval=2))
    again = trainer(tmp_path, second, build())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert second.rotation.state() == first.rotation.state()
    one, two = state(run.model), state(again.model)
    assert any("layernorm" in name for name in one)
    assert all(torch.equal(one[name], two[name]) for name in one)
    late = trainer(tmp_path, None, build())
    late.add_callback(ISTCallback(IST(layers=2, interval=2)))
    with pytest.raises(ValueError, match=r"make the Trainer with callbacks=\[ISTCallback"):
        late.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_layers_take_turns_once(tmp_path):
    """Two methods on one model, or a second run over what an interrupted one left idle, would see too few layers."""
    model = adapted()
    both = trainer(tmp_path, ISTCallback(RST(layers=2)), model)
    both.add_callback(ISTCallback(RST(layers=3)))
    with pytest.raises(ValueError, match="this Trainer has 2 of them"):
        both.train()

    class Interrupt(tf.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    first = ISTCallback(RST(layers=2))
    run = trainer(tmp_path, first, adapted())
    run.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        run.train()
    with pytest.raises(ValueError, match=r"call release\(\) of its rotation first"):
        trainer(tmp_path, ISTCallback(RST(layers=2)), run.model).train()
    first.rotation.release()
    again = ISTCallback(RST(layers=2))
    trainer(tmp_path, again, run.model).train()
    assert len(again.rotation.layers) == 8


def test_a_collator_that_draws_changes_nothing_else(tmp_path):
    results = []
    for callback in (None, ISTCallback(IST(layers=1.0, interval=2))):
        run = trainer(tmp_path, callback)
        collate = run.data_collator
        run.data_collator = lambda rows, collate=collate: (torch.rand(3), collate(rows))[1]
        run.train()
        results.append(trained(run.model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_resume_under_another_method_is_refused(tmp_path):
    trainer(tmp_path, ISTCallback(IST(layers=2)), max_steps=2, save_strategy="steps", save_steps=1).train()
    again = trainer(tmp_path, ISTCallback(IST(layers=3)), max_steps=2)
    with pytest.raises(ValueError, match="resume: the checkpoint's layers is 2, this run's 3"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_rst_needs_no_data_and_draws_as_ist_without_scores(tmp_path):
    one, two = ISTCallback(RST(layers=2)), ISTCallback(IST(layers=2, rate=0))
    for callback in (one, two):
        trainer(tmp_path, callback, max_steps=4).train()
    assert one.rotation.history["draws"] == two.rotation.history["draws"]


def test_the_trainers_loss_measures_unless_the_probe_has_its_own(tmp_path):
    """And a loss that divides by the number of items is told how many there are."""
    counts, calls = [], []

    def per_item(outputs, labels, num_items_in_batch):
        counts.append(int(num_items_in_batch))
        logits = outputs["logits"][:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    def own(model, batch):
        calls.append(1)
        return model(**batch).loss

    class SparseHFTrainer(SparseMixin, tf.Trainer):
        pass

    for data in (probe(), Batches(probe().data, own)):
        before = len(counts)
        tuner = attach(adapted(), IST(layers=2, interval=2), probe=data)
        batch = tiny.batch(NAME, rows=8)
        rows = [{key: tensor[i] for key, tensor in batch.items()} for i in range(8)]
        args = tf.TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to="none", save_strategy="no"
        )
        SparseHFTrainer(tuner, args=args, train_dataset=rows, compute_loss_func=per_item).train()
        assert tuner.rotation.probes == 1
        assert len(counts) - before == (5 if data.loss_fn is not own else 2)
        assert len(calls) == (0 if data.loss_fn is not own else 3)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"ISTCallback: IST\(of=…\) needs attach"):
        ISTCallback(IST(of=S2FT()))
    with pytest.raises(ValueError, match=r"LISA\(of=…\)"):
        ISTCallback(LISA())
    run = trainer(tmp_path, ISTCallback(), remove_unused_columns=False)
    run.train_dataset = [{"chosen": row["input_ids"], "rejected": row["input_ids"]} for row in run.train_dataset]
    with pytest.raises(ValueError, match="batches hold chosen, rejected, of which the model makes no loss"):
        run.train()
    run = trainer(tmp_path, ISTCallback())
    run.train_dataset = Stream(run.train_dataset)
    with pytest.raises(ValueError, match="an iterable training set"):
        run.train()
    with pytest.raises(ValueError, match="8 layers"):
        trainer(tmp_path, ISTCallback(IST(layers=9))).train()
