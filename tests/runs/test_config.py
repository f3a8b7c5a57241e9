"""Run files: defaults, overrides, every mistake in one message, and the method built once."""

import dataclasses

import pytest

from intaglio import ID3, IST, S2FT
from intaglio.runs import methods
from intaglio.runs.config import AttachBlock, load_config
from intaglio.training.updates import Updates

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


def test_the_method_is_built_once(monkeypatch):
    """What checks the file, what asks for its settings and what trains is one object; `run.json` holds the blocks alone."""
    built, build = [], methods.build
    monkeypatch.setattr(methods, "build", lambda block, *where, **options: built.append(block) or build(block, *where, **options))
    config = load_config(GOOD | {"schedule": {"name": "ist", "layers": 1, "suppressed": 1}})
    assert isinstance(config.attached, IST)
    assert config.attached is config.attached
    assert config.attached.of == S2FT()
    assert [block["name"] for block in built] == ["s2ft", "ist"]
    assert load_config(config.model_dump(mode="json")).attached == config.attached
    assert load_config(GOOD | {"method": {"name": "lora"}}).attached is None
    assert load_config(GOOD | {"method": {"name": "lora"}, "schedule": {"name": "ist", "layers": 1, "suppressed": 1}}).attached


def test_an_attach_block_takes_every_option_of_updates():
    """Their names, types and defaults come from `Updates`; only `accumulation` waits for the number of passes."""
    fields = {field.name: field.default for field in dataclasses.fields(Updates)}
    block = AttachBlock.model_validate({})
    assert {name: getattr(block, name) for name in fields} == fields | {"accumulation": None}
    assert block.updates(1) == Updates()
    assert block.updates(2) == Updates(accumulation="exact")
    chosen = {"bias_correction": "per_entry", "clip": "dense", "decay": "start", "accumulation": "none"}
    config = load_config(GOOD | {"method": {"name": "id3"}, "attach": chosen})
    assert config.attach.updates(1) == Updates(**chosen)
    assert isinstance(config.attached, ID3)


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
    "no candidates": ({"method": {"name": "id3"}, "attach": {"oversampling": 0}}, "attach: .*oversampling=0"),
    "update option": ({"method": {"name": "id3"}, "attach": {"clip": "all"}}, "attach.clip: .*'selected' or 'dense'.*'all'"),
    "attach key": ({"attach": {"permuted": True}}, "attach.permuted: unknown key; did you mean 'permute'"),
    "schedule name": ({"schedule": {"name": "s2ft"}}, "schedule.name='s2ft': unknown; .*ist"),
    "schedule of": ({"schedule": {"name": "ist", "of": {"name": "s2ft"}}}, "schedule.of: .*leave it out"),
    "schedule field": ({"schedule": {"name": "ist", "layer": 1}}, "schedule.layer: .*did you mean 'layers'"),
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
    raw = {"method": {"name": "nope"}, "data": {"tsk": 1}, "train": {"max_step": 1}, "extra": 1, "schedule": {"name": "no"}}
    with pytest.raises(ValueError) as error:
        load_config(raw)
    for part in ("problems in the run file", "method.name='nope'", "data.tsk", "train.max_step", "extra", "schedule.name='no'"):
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
