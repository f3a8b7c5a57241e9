"""The reference of preference and reward trainers is the model that is trained, as it was before: after SFT, its result."""

import copy
import math

import pytest
import torch
import transformers as tf
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from intaglio import S2FT, attach
from intaglio.hf.trainer import SparseMixin
from support import tiny


class SparseDPOTrainer(SparseMixin, DPOTrainer):
    pass


class SparseGRPOTrainer(SparseMixin, GRPOTrainer):
    pass


@pytest.fixture
def trained(tmp_path):
    """A model that SFT has moved far from the folder it was read from, attached anew; and its tokenizer."""
    base = tiny.save_folder(tmp_path / "base")
    model = tf.AutoModelForCausalLM.from_pretrained(base)
    first, ids = attach(model, S2FT(o=0.25, down=0.1)), torch.arange(3, 19)[None]
    optimizer = first.optimizer(torch.optim.AdamW, lr=0.05)
    for _ in range(5):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    first.detach()
    return attach(model, S2FT(o=0.25, down=0.1, seed=1)), tf.AutoTokenizer.from_pretrained(base)


def arguments(config, folder, **fields):
    common = {"max_steps": 1, "logging_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    return config(str(folder / "run"), per_device_train_batch_size=2, save_strategy="no", **(common | fields))


PAIRS = Dataset.from_list([{"prompt": f"q{i} ", "chosen": f"good {i}", "rejected": "bad"} for i in range(8)])


def nothing(completions, **_):
    """A reward of 0 for each."""
    return [0.0] * len(completions)


def test_dpo_begins_at_ln_2(trained, tmp_path):
    tuner, tokenizer = trained
    run = SparseDPOTrainer(tuner, args=arguments(DPOConfig, tmp_path), train_dataset=PAIRS, processing_class=tokenizer)
    run.train()
    assert next(log["loss"] for log in run.state.log_history if "loss" in log) == pytest.approx(math.log(2), abs=1e-4)


def test_a_reference_of_the_user_stays(trained, tmp_path):
    tuner, tokenizer = trained
    other = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = copy.deepcopy(other.state_dict())
    run = SparseDPOTrainer(
        tuner, ref_model=other, args=arguments(DPOConfig, tmp_path), train_dataset=PAIRS, processing_class=tokenizer
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.ref_model.state_dict().items())


def test_grpo_s_own_reference_is_the_model_too(trained, tmp_path):
    tuner, tokenizer = trained
    settings = arguments(GRPOConfig, tmp_path, beta=0.1, num_generations=2)
    rows = Dataset.from_list([{"prompt": "q"}] * 4)
    run = SparseGRPOTrainer(tuner, args=settings, reward_funcs=nothing, train_dataset=rows, processing_class=tokenizer)
    reference, own = run.ref_model.state_dict(), tuner.model.state_dict()
    assert reference.keys() == own.keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in reference.items())
