"""Layers in turn in the Hugging Face Trainer, through `SparseMixin`."""

import pytest
import torch
import transformers as tf

from intaglio import ID3, IST, S2FT, attach
from intaglio.hf.trainer import SparseMixin
from support import tiny
from support.layers import NAME, adapted, probe, same, stack, weights

CASES = {
    "lora": (IST(layers=2, interval=4), adapted),
    "s2ft": (IST(layers=2, interval=4, of=S2FT(o=0.5, down=0.25)), stack),
    "id3 on lora": (IST(layers=2, interval=4, of=ID3(budget=0.2)), adapted),
}


class SparseHFTrainer(SparseMixin, tf.Trainer):
    pass


def trainer(case, folder, **settings):
    common = {
        "output_dir": str(folder), "max_steps": 18, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "use_cpu": True,
        "weight_decay": 0.1, "logging_steps": 6, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    method, build = CASES[case]
    tuner = attach(build(), method, probe=probe())
    batch = tiny.batch(NAME, rows=40)
    rows = [{key: tensor[i] for key, tensor in batch.items()} for i in range(40)]
    return tuner, SparseHFTrainer(tuner, args=tf.TrainingArguments(**(common | settings)), train_dataset=rows)


@pytest.mark.parametrize("case", CASES)
def test_resume_in_the_trainer_is_exact(tmp_path, case):
    """IST checklist 23: from an own file in the checkpoint; the model's adapter starts elsewhere at random."""
    tuner, run = trainer(case, tmp_path, save_strategy="steps", save_steps=7)
    run.train()
    torch.manual_seed(77)
    resumed, again = trainer(case, tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert resumed.rotation.state() == tuner.rotation.state()
    assert tuner.rotation.probes == 4
    assert same(weights(tuner.model), weights(resumed.model))


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_trainer_s_checkpointing_keeps_the_cut(tmp_path, checkpointing):
    """IST checklist 16: the Trainer turns checkpointing on after `attach`; idle layers get no gradient either way."""
    tuner, run = trainer("lora", tmp_path, max_steps=5, gradient_checkpointing=checkpointing)
    run.train()
    assert sum(tuner.rotation.visits) == 10
    other, plain = trainer("lora", tmp_path, max_steps=5)
    plain.train()
    assert other.rotation.history["draws"] == tuner.rotation.history["draws"]
    assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(tuner.parameters(), other.parameters(), strict=True))
