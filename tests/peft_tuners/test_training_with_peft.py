"""Trainers around the PEFT face: transformers' Trainer, TRL's SFTTrainer and DPOTrainer, on tiny models."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from intaglio import Delta
from intaglio.hf import DeltaConfig, S2FTConfig
from support import tiny
from support.peft_models import RANDOM, S2FT, logits, same

COMMON = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
ROWS = [{"prompt": f"add {i} and 1: ", "completion": str(i + 1)} for i in range(8)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save_folder(tmp_path_factory.mktemp("base"))


def tensors(model):
    """The adapter's tensors, by name."""
    return {key: t for key, t in model.state_dict().items() if "intaglio_" in key}


def run(folder, steps, config, dtype, resume=None, keep=None):
    model = get_peft_model(tiny.build("gqa_llama", dtype=dtype), copy.deepcopy(config))
    data = [{key: t[0] for key, t in tiny.batch("gqa_llama", rows=1, seed=i).items()} for i in range(20)]
    args = TrainingArguments(
        folder, max_steps=steps, save_steps=keep or 100, lr_scheduler_type="constant", weight_decay=0.1, **COMMON
    )
    trainer = Trainer(model=model, args=args, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [S2FTConfig(**S2FT), DeltaConfig(method=RANDOM)], ids=["s2ft", "random"])
def test_ten_updates_are_five_a_checkpoint_and_five(config, dtype, tmp_path):
    """S2FT checklist 20: bit for bit, values and optimizer, through transformers' Trainer."""
    whole = run(tmp_path / "whole", 10, config, dtype)
    run(tmp_path / "half", 5, config, dtype, keep=5)
    checkpoint = tmp_path / "half" / "checkpoint-5"
    resumed = run(tmp_path / "half", 10, config, dtype, resume=str(checkpoint))
    expected, found = tensors(whole.model), tensors(resumed.model)
    assert expected.keys() == found.keys()
    assert all(torch.equal(t, found[key]) for key, t in expected.items())
    halfway = PeftModel.from_pretrained(tiny.build("gqa_llama", dtype=dtype), checkpoint)
    assert not all(torch.equal(t, tensors(halfway)[key]) for key, t in expected.items())
    moments = [[s["exp_avg"] for s in t.optimizer.state.values()] for t in (whole, resumed)]
    assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True))
    chosen = whole.model.peft_config["default"].trainable
    assert sum(m.numel() for m in moments[0]) == chosen
    assert Delta.load(checkpoint).selection.size == chosen


def test_sft_trainer_takes_the_config(base, tmp_path):
    """SFTTrainer(peft_config=S2FTConfig(…)): trains, saves, and what is saved is a Delta and a PEFT adapter."""
    args = SFTConfig(str(tmp_path), max_steps=2, gradient_checkpointing=True, **COMMON)
    config = S2FTConfig(**S2FT, task_type="CAUSAL_LM")
    trainer = SFTTrainer(base, args=args, train_dataset=Dataset.from_list(ROWS), peft_config=config)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    delta, fresh = Delta.load(tmp_path / "adapter"), AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(fresh, tmp_path / "adapter").merge_and_unload()
    applied = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert not same(applied, merged)
    delta.apply_(applied)
    assert same(applied, merged)


def pairs():
    return Dataset.from_list([row | {"chosen": row.pop("completion"), "rejected": "no"} for row in map(dict, ROWS)])


def test_dpo_trainer_takes_the_config(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = logits(model)
    args = DPOConfig(str(tmp_path), max_steps=2, bf16=False, **COMMON)
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = S2FTConfig(**S2FT, task_type="CAUSAL_LM")
    trainer = DPOTrainer(model, args=args, train_dataset=pairs(), processing_class=tokenizer, peft_config=config)
    trainer.train()
    assert not torch.equal(logits(trainer.model), before)
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model), before)
    assert trainer.state.log_history[0]["train_loss"] > 0


def test_dpo_goes_on_from_a_loaded_adapter(base, tmp_path):
    """TRL adds a reference copy of the adapter and copies parameters only; the copy must share its places."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), S2FTConfig(**S2FT, init_weights=False)
    )
    model.save_pretrained(tmp_path / "adapter")
    before = logits(model)
    fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter", is_trainable=True)
    args = DPOConfig(str(tmp_path), max_steps=2, bf16=False, **COMMON)
    trainer = DPOTrainer(loaded, args=args, train_dataset=pairs(), processing_class=AutoTokenizer.from_pretrained(base))
    trainer.train()
    assert not torch.equal(logits(loaded), before)
    loaded.set_adapter("ref")
    assert torch.equal(logits(loaded), before)


def test_trainable_tokens_go_along(tmp_path):
    """A config field that TRL fills when a chat template brings new tokens."""
    config = S2FTConfig(**S2FT, trainable_token_indices={"embed_tokens": [5, 7]})
    model = get_peft_model(tiny.build("gqa_llama"), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**tiny.batch("gqa_llama")).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.build("gqa_llama"), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert "embed_tokens" in str([key for key in again.state_dict() if "trainable_tokens" in key])
