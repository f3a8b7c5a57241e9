import pytest

from intaglio.runs.config import load_config

GOOD = {"method": {"name": "s2ft"}, "data": {"task": "reasoning_gym/chain_sum"}}


def test_defaults_and_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: {task: reasoning_gym/chain_sum}\ntrain: {learning_rate: 1e-3}\n")
    config = load_config(path, ["method.down=0.5", "train.max_steps=7", "data.settings.min_terms=2", "evaluate.limit=3"])
    assert config.model.name == "smollm2-135m"
    assert config.method == {"name": "s2ft", "down": 0.5}
    assert config.train == {"learning_rate": 1e-3, "max_steps": 7}
    assert config.data.settings == {"min_terms": 2}
    assert config.evaluate is not None
    assert config.evaluate.limit == 3


def test_model_block_passes_other_keys_on():
    config = load_config(GOOD | {"model": {"name": "x", "dtype": "bfloat16", "revision": "main"}})
    assert config.model.kwargs() == {"dtype": "bfloat16", "revision": "main"}


BAD = {
    "method": ({"method": {"name": "s2tf"}}, "did you mean 's2ft'"),
    "method field": ({"method": {"name": "s2ft", "dwn": 0.1}}, "did you mean 'down'"),
    "share": ({"method": {"name": "s2ft", "down": 1.5}}, "at most 1.0"),
    "lora field": ({"method": {"name": "lora", "rank": 8}}, "method.rank: unknown key"),
    "bottleneck field": ({"method": {"name": "bottleneck", "size": 8}}, "method.size: unknown key"),
    "bottleneck value": (
        {"method": {"name": "bottleneck", "activation": "swish"}},
        "method: BottleneckConfig: activation='swish'",
    ),
    "block": ({"trian": {}}, "did you mean 'train'"),
    "data key": ({"data": {"task": "reasoning_gym/gcd", "sed": 1}}, "did you mean 'seed'"),
    "train key": ({"train": {"learning_rte": 1}}, "did you mean 'learning_rate'"),
    "evaluate key": ({"evaluate": {"max_tokens": 1}}, "did you mean 'max_new_tokens'"),
    "no source": ({"data": {}}, "exactly one of"),
    "two sources": ({"data": {"task": "reasoning_gym/gcd", "train": "x.csv"}}, "exactly one of"),
    "test with task": ({"data": {"task": "reasoning_gym/gcd", "test": "x.csv"}}, "no effect"),
    "extract": ({"evaluate": {"extract": "("}}, "not a regular expression"),
    "output_dir": ({"train": {"output_dir": 2024}}, "wanted is a folder's name"),
    "method type": ({"method": {"name": "s2ft", "select": "best"}}, "wanted is one of random"),
    "method name type": ({"method": {"name": ["s2ft"]}}, "unknown"),
    "type": ({"data": {"task": "reasoning_gym/gcd", "train_size": "many"}}, "data.train_size.*'many'"),
    "lean and dense": (
        {"method": {"name": "id3"}, "attach": {"accumulation": "lean", "clip": "dense"}},
        "attach: .*whole gradients",
    ),
    "idle oversampling": ({"method": {"name": "id3"}, "attach": {"oversampling": 20}}, "attach: .*oversampling=20"),
    "no accumulation": (
        {"method": {"name": "id3"}, "attach": {"accumulation": "none"}, "train": {"gradient_accumulation_steps": 2}},
        "take exact or lean",
    ),
    "length": ({"method": {"name": "id3", "steps": 5}, "train": {"max_steps": 9}}, "method.steps=5: train.max_steps=9"),
    "range": ({"evaluate": {"batch_size": 0}}, "greater than or equal to 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_run_files(case):
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        load_config(GOOD | change)


def test_all_problems_come_at_once():
    raw = {"method": {"name": "nope"}, "data": {"tsk": 1}, "train": {"max_step": 1}, "extra": 1}
    with pytest.raises(ValueError) as error:
        load_config(raw)
    for part in ("problems in the run file", "method.name='nope'", "data.tsk", "train.max_step", "extra"):
        assert part in str(error.value)


def test_bad_files_and_overrides(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    listed = tmp_path / "list.yaml"
    listed.write_text("- 1")
    for path, message in ((tmp_path / "absent.yaml", "no such run file"), (broken, "not YAML"), (listed, "holds the blocks")):
        with pytest.raises(ValueError, match=message):
            load_config(path)
    replaced = load_config(GOOD, ["method={name: lora, r: 8}"])
    assert replaced.method == {"name": "lora", "r": 8}
    replaced = load_config(GOOD, ["method={name: bottleneck, bottleneck_size: 8, target_modules: [mlp]}"])
    assert replaced.method == {"name": "bottleneck", "bottleneck_size": 8, "target_modules": ["mlp"]}
    for override in ("learning_rate=1", "train.learning_rate", "=1", "train.=1"):
        with pytest.raises(ValueError, match=r"block\.key=value"):
            load_config(GOOD, [override])
    for override in ("method={name: lora", "method.include=*.mlp.*"):
        with pytest.raises(ValueError, match="is not YAML"):
            load_config(GOOD, [override])
    with pytest.raises(ValueError, match="is not a block"):
        load_config(GOOD, ["data.task.x=1"])


def test_yaml_never_builds_objects(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text("data: !!python/object/apply:os.system ['true']")
    with pytest.raises(ValueError, match="not YAML"):
        load_config(path)
