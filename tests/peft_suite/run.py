"""Run PEFT's own tests on Intaglio's configs, without editing them: `python run.py FOLDER [pytest arguments]`.

FOLDER is an unpacked source distribution of the installed PEFT. Its tests are parametrised by module-level lists of rows;
here each list is replaced by rows of ours, and only tests that such a row reaches are kept: the others name another method.
What PEFT's tests then skip by themselves asks for a trained `bias`, for prompt learning, or for a config class they list by
name (mixed batches of DeltaConfig; tests/peft_tuners/test_several_adapters.py has those), none of which our configs are.
"""

import copy
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch
import transformers

from intaglio.hf import DeltaConfig, S2FTConfig
from support import tiny

RANDOM, FULL, PAFI = {"name": "random", "budget": 0.3}, {"name": "full"}, {"name": "pafi", "budget": 0.3}

# name, model of PEFT's tests, config, its arguments
CUSTOM = [
    ("MLP one target", "MLP", S2FTConfig, {"target_modules": "lin0", "down": 0.5}),
    ("MLP list", "MLP", S2FTConfig, {"target_modules": ["lin0"], "down": 0.5}),
    ("MLP other layer", "MLP", S2FTConfig, {"target_modules": ["lin1"], "down": 0.5}),
    ("MLP both", "MLP", S2FTConfig, {"target_modules": ["lin0", "lin1"], "down": 0.5}),
    ("MLP all columns", "MLP", S2FTConfig, {"target_modules": ["lin0"], "down": 1.0}),
    ("MLP saves lin1", "MLP", S2FTConfig, {"target_modules": ["lin0"], "modules_to_save": ["lin1"], "down": 0.5}),
    ("MLP excludes", "MLP", S2FTConfig, {"target_modules": ["lin0", "lin1"], "exclude_modules": ["lin1"], "down": 0.5}),
    ("MLP norm", "MLP_LayerNorm", S2FTConfig, {"target_modules": ["lin0", "lin1"], "down": 0.5}),
    ("Transposed", "EmbConv1D", S2FTConfig, {"target_modules": ["conv1d", "lin0"], "down": 0.6}),
    ("MLP elements", "MLP", DeltaConfig, {"target_modules": ["lin0", "lin1"], "method": RANDOM}),
    ("MLP smallest", "MLP", DeltaConfig, {"target_modules": ["lin0"], "method": PAFI}),
    ("MLP whole", "MLP", DeltaConfig, {"target_modules": ["lin0"], "method": FULL}),
    ("Norm elements", "MLP_LayerNorm", DeltaConfig, {"target_modules": ["layernorm0", "lin0"], "method": RANDOM}),
    ("Norm whole", "MLP_LayerNorm", DeltaConfig, {"target_modules": ["layernorm1"], "method": FULL}),
    ("Embedding elements", "EmbConv1D", DeltaConfig, {"target_modules": ["emb", "lin0"], "method": RANDOM}),
    ("Conv2d elements", "Conv2d", DeltaConfig, {"target_modules": ["conv2d"], "method": RANDOM}),
    ("Conv2d whole", "Conv2d", DeltaConfig, {"target_modules": ["conv2d", "lin0"], "method": FULL}),
    ("Conv3d elements", "Conv3d", DeltaConfig, {"target_modules": ["conv3d"], "method": RANDOM}),
]

# Two adapters active at once must not replace the same entries (we refuse that), so the seeds are such that they do not.
LIN0, LIN1 = {"target_modules": ["lin0"], "init_weights": False}, {"target_modules": ["lin1"], "init_weights": False}
SEVERAL = [
    ("S2FT Same", "s2ft", S2FTConfig, LIN0 | {"down": 0.2}, LIN0 | {"down": 0.2, "seed": 1}),
    ("S2FT Different", "s2ft", S2FTConfig, LIN0 | {"down": 0.5}, LIN1 | {"down": 0.5}),
    (
        "Random Same", "random", DeltaConfig,
        LIN0 | {"method": {"name": "random", "budget": 4}}, LIN0 | {"method": {"name": "random", "budget": 4, "seed": 1}},
    ),
    ("Random Different", "random", DeltaConfig, LIN0 | {"method": RANDOM}, LIN1 | {"method": RANDOM}),
]  # fmt: skip


def transformer(task: str, layers: str = "*layer*") -> list[tuple]:
    """Rows for whole transformers: S2FT, and entries and whole tensors of the layers."""
    common = {"task_type": task}
    return [
        (S2FTConfig, common | {"o": 0.5, "down": 0.3}),
        (S2FTConfig, common | {"o": None, "down": 0.3, "v": 0.5, "init_weights": False}),
        *others(task, layers),
    ]


def others(task: str, layers: str) -> list[tuple]:
    return [
        (DeltaConfig, {"task_type": task, "method": {"name": "random", "budget": 0.05, "include": (layers,)}}),
        (DeltaConfig, {"task_type": task, "method": {"name": "full", "include": (layers,)}}),
    ]


CONFIGS = [(S2FTConfig, {}), (DeltaConfig, {"method": RANDOM})]


def t5() -> transformers.PreTrainedModel:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 96}
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))


def write(folder: Path, **models: transformers.PreTrainedModel) -> list[str]:
    """Write tiny models; PEFT's tests use token 1, which must not be the padding token."""
    for name, model in models.items():
        model.config.pad_token_id = 0
        if model.can_generate():
            model.generation_config.pad_token_id = 0
        model.save_pretrained(folder / name)
    return [str(folder / name) for name in models]


def swap_rows(module: ModuleType, rows: dict[str, list]) -> None:
    """Replace the rows of every `parametrize` mark of a test module that uses one of the named lists."""
    lists = {id(getattr(module, name)): new for name, new in rows.items()}
    for cls in [value for value in vars(module).values() if isinstance(value, type)]:
        for test in [value for value in vars(cls).values() if hasattr(value, "pytestmark")]:
            test.pytestmark = [
                pytest.mark.parametrize(mark.args[0], copy.copy(lists[id(mark.args[1])])).mark
                if mark.name == "parametrize" and id(mark.args[1]) in lists
                else mark
                for mark in test.pytestmark
            ]


# Tests of what we refuse on purpose, or that need the network. Everything else that reaches a config of ours runs.
LEFT_OUT = {
    # reads a LoRA config from the hub
    "test_config.py::TestPeftConfig::test_from_pretrained[": "network",
    "test_config.py::TestPeftConfig::test_from_pretrained_cache_dir[": "network",
    "test_config.py::TestPeftConfig::test_save_pretrained_with_runtime_config[": "network",
    # wants back the class it saved; S2FTConfig is a way to write a DeltaConfig, and is read back as that
    "test_from_pretrained_forward_compatible[S2FTConfig": "another class",
    "test_from_pretrained_forward_compatible_load_from_peft_config[S2FTConfig": "another class",
    # averages adapters, which we refuse: they hold values, not differences
    "test_weighted_combination_of_adapters[": "refused",
    # loads an adapter onto a base with other random weights: a wrong base, which we refuse (test_delta_model.py)
    "TestRequiresGrad::test_loading_model_requires_grad_set_correctly[": "wrong base",
    "TestRequiresGrad::test_loading_model_with_modules_to_save_requires_grad_set_correctly[": "wrong base",
    # merges two adapters that replace the same entries, which we refuse; TestMultipleActiveAdapters merges disjoint ones
    "TestDecoderModels::test_merge_layers_multi[": "overlap",
}
# these modules have no in_features to show
LEFT_OUT |= {
    f"test_in_features_out_features_exposed[{name}": "no such sizes" for name in ("Norm", "Embedding", "Conv2d", "Conv3d")
}


class Ours:
    """Keeps the tests that a config of ours reaches."""

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept = [item for item in items if _is_ours(item)]
        config.hook.pytest_deselected(items=[item for item in items if not _is_ours(item)])
        items[:] = kept


def _is_ours(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    if any(name in item.nodeid for name in LEFT_OUT):
        return False
    return callspec is not None and any(value in (S2FTConfig, DeltaConfig) for value in callspec.params.values())


def main(folder: str, *arguments: str) -> int:
    os.chdir(folder)
    Path("tests/__init__.py").touch()  # the distribution leaves it out
    sys.path.insert(0, os.getcwd())
    try:
        import diffusers  # noqa: F401
    except ImportError:  # the tests ask it for one class, to tell images from text
        stub = ModuleType("diffusers")
        stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
        sys.modules["diffusers"] = stub
    from tests import (
        test_config,
        test_custom_models,
        test_decoder_models,
        test_encoder_decoder_models,
        test_feature_extraction_models,
        test_seq_classifier,
        testing_common,
    )

    # Their tests of mixed batches ask whether the config is one that can: ours can.
    test_decoder_models.LoraConfig = testing_common.LoraConfig = S2FTConfig
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        # Some tests are skipped where a path holds "llama", for another method's sake.
        decoders = write(Path(name), gqa=tiny.build("gqa_llama"), qkv_bias=tiny.build("qkv_bias_qwen2"))
        encoders = write(Path(name), bert=tiny.build("bert"), roberta=tiny.build("roberta"))
        headless = write(Path(name), bert_encoder=tiny.build("bert").bert, deberta_encoder=tiny.build("deberta_v2").deberta)
        rows = {
            test_config: {"ALL_CONFIG_CLASSES": CONFIGS, "LAYER_INDEXING_CONFIG_CLASSES": CONFIGS},
            test_custom_models: {
                "TEST_CASES": CUSTOM,
                "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": SEVERAL,
                "ALL_PEFT_CONFIG_CLASSES": [S2FTConfig],  # built with a target alone, where DeltaConfig wants its method
            },
            test_decoder_models: {
                "PEFT_DECODER_MODELS_TO_TEST": decoders,
                "SMALL_GRID_MODELS": decoders,
                "ALL_CONFIGS": transformer("CAUSAL_LM"),
            },
            test_seq_classifier: {"PEFT_SEQ_CLS_MODELS_TO_TEST": encoders, "ALL_CONFIGS": transformer("SEQ_CLS")},
            test_feature_extraction_models: {
                "PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST": headless,
                "ALL_CONFIGS": transformer("FEATURE_EXTRACTION"),
            },
            test_encoder_decoder_models: {
                "PEFT_ENCODER_DECODER_MODELS_TO_TEST": write(Path(name), t5=t5()),
                "ALL_CONFIGS": others("SEQ_2_SEQ_LM", "*block*"),
            },
        }
        for module, new in rows.items():
            swap_rows(module, new)
        files = [f"tests/{module.__name__.rpartition('.')[2]}.py" for module in rows]
        options = ["-q", "-c", os.devnull, "--rootdir", os.getcwd(), "-p", "no:cacheprovider", "-W", "ignore", "-rs"]
        return pytest.main([*options, *files, *arguments], plugins=[Ours()])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
