"""Mistakes that are known before the first step end there, in a line that says what to do."""

import pytest
import torch
import transformers as tf

from intaglio.runs.checks import check_model, check_packages
from intaglio.runs.config import load_config
from intaglio.runs.folder import held, sweep
from intaglio.runs.load import stored_config
from support import tiny


def config_of(**fields):
    base = {"architectures": ["LlamaForCausalLM"], "vocab_size": 100, "max_position_embeddings": 64}
    return tf.LlamaConfig(**base | fields)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (config_of(vocab_size=80), "the tokenizer has 90 tokens, the model 80 embeddings"),
        (tf.BertConfig(architectures=["BertForMaskedLM"]), "is a BertForMaskedLM; `intaglio train` fine-tunes causal"),
        (tf.T5Config(architectures=["T5ForConditionalGeneration"]), "is a T5ForConditionalGeneration"),
    ],
)
def test_a_model_that_does_not_fit(config, message):
    with pytest.raises(ValueError, match=message):
        check_model(config, range(90))


def test_models_that_fit_pass():
    check_model(config_of(), range(90))
    check_model(config_of(architectures=None), range(100))
    check_model(tf.GPT2Config(architectures=["GPT2LMHeadModel"]), range(90))


@pytest.mark.parametrize(
    ("train", "model", "message"),
    [
        ({"optim": "galore_adamw"}, {}, "train.optim=galore_adamw: needs the package galore_torch"),
        ({"use_liger_kernel": True}, {}, "needs the package liger_kernel"),
        ({}, {"attn_implementation": "flash_attention_2"}, "needs the package flash_attn"),
        ({}, {"load_in_4bit": True}, "no quantized base"),
    ],
)
def test_packages_that_are_missing(train, model, message):
    with pytest.raises(ValueError, match=message):
        check_packages(train, model)


def test_one_process_writes_into_a_folder(tmp_path):
    run = tmp_path / "run"
    with held(run):
        with pytest.raises(ValueError, match="another process is training into it"), held(run):
            pass
        (run / "kept").write_text("x")
    assert sorted(path.name for path in run.iterdir()) == ["kept"]
    with held(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()


def test_half_written_files_are_swept_and_others_stay(tmp_path):
    for name in (".adapter.abcdefgh", ".checkpoint-5.abcdefgh", "checkpoint-5/.optimizer.pt.abcdefgh", ".git", ".notes.abcdefgh"):
        (tmp_path / name).mkdir(parents=True)
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".git", ".notes.abcdefgh", "checkpoint-5"]
    assert not list((tmp_path / "checkpoint-5").iterdir())


@pytest.mark.parametrize(
    "asked",
    [
        {"trust_remote_code": True},
        {"attn_implementation": "owner/kernel"},
        {"use_kernels": True},
        {"weights_only": False},
    ],
)
def test_a_run_folder_runs_no_code(tmp_path, asked):
    import json

    blocks = {"model": {"name": "x", **asked}, "method": {"name": "random"}, "data": {"train": "x.jsonl"}}
    (tmp_path / "run.json").write_text(json.dumps({"config": blocks}))
    with pytest.raises(ValueError, match=r"would run code that this folder names; say --trust-remote-code"):
        stored_config(tmp_path)
    assert stored_config(tmp_path, trust=True).model.kwargs() == asked


def blocks(path, text):
    path.write_text(text)
    return load_config(path)


BASE = "method: {name: s2ft}\ndata: {train: rows.jsonl}\n"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (BASE + "method: {name: random}\n", "method"),
        ("method: {name: s2ft, o: 0.1, o: 0.5}\ndata: {train: x.jsonl}\n", "'o'"),
        (BASE + "train: {max_steps: 1, max_steps: 2}\n", "max_steps"),
        ('{"method": {"name": "s2ft"}, "data": {"train": "x.jsonl"}, "data": {"train": "y.jsonl"}}', "data"),
    ],
)
def test_a_key_stands_once(tmp_path, text, key):
    with pytest.raises(ValueError, match=rf"line \d.*{key}.* stands twice"):
        blocks(tmp_path / "run.yaml", text)


def test_yaml_means_what_people_mean(tmp_path):
    text = BASE + "train: {save_strategy: no, packing: no, max_steps: 010, learning_rate: 1e-3, run_name: 1:30}\n"
    train = blocks(tmp_path / "run.yaml", text).train
    assert train == {"save_strategy": "no", "packing": False, "max_steps": 10, "learning_rate": 1e-3, "run_name": "1:30"}
    merged = blocks(tmp_path / "m.yaml", "x: &x\n".replace("x: &x\n", "") + BASE + "train: {<<: {max_steps: 3}, max_steps: 4}\n")
    assert merged.train["max_steps"] == 4
    method = blocks(tmp_path / "b.yaml", BASE.replace("s2ft", "s2ft, select: weight, largest: yes")).method
    assert method["largest"] is True


def test_an_evaluate_block_can_be_added_and_taken_away(tmp_path):
    (tmp_path / "run.yaml").write_text(BASE)
    stored = load_config(tmp_path / "run.yaml").model_dump(mode="json")
    assert load_config(stored, ["evaluate.limit=4"]).evaluate.limit == 4
    assert load_config(stored | {"evaluate": {}}, ["evaluate=null"]).evaluate is None


def test_no_step_is_no_run(tmp_path):
    with pytest.raises(ValueError, match=r"train\.max_steps=0: trains nothing"):
        blocks(tmp_path / "run.yaml", BASE + "train: {max_steps: 0}\n")


def test_the_tiny_models_pass():
    model = tiny.build("gqa_llama")
    model.config.architectures = ["LlamaForCausalLM"]
    check_model(model.config, range(model.config.vocab_size))
    assert isinstance(model.get_input_embeddings(), torch.nn.Embedding)
