"""What the PEFT face refuses: wrong bases, damaged tensors, quantized weights, wrappers that would be passed over."""

import json
import os
import shutil

import pytest
import safetensors.torch
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from intaglio import Delta, Selection
from intaglio.adapter.folder import CONFIG, WEIGHTS
from intaglio.core.entries import Elements, Whole
from intaglio.core.fingerprint import fingerprint
from intaglio.hf import DeltaConfig, S2FTConfig
from support import tiny
from support.exports import rewrite
from support.peft_models import RANDOM, S2FT, delta_folder, logits, refuses, same, trained


@pytest.fixture(scope="module", params=[{"name": "s2ft"} | S2FT, RANDOM], ids=lambda m: m["name"])
def folder(request, tmp_path_factory):
    return delta_folder(tmp_path_factory.mktemp("adapter"), request.param, dtype=torch.bfloat16)


BASES = {
    "other values": ({"seed": 7, "dtype": torch.bfloat16}, "gqa_llama", "fingerprint"),
    "other type": ({}, "gqa_llama", "dtype=torch.bfloat16"),
    "other shapes": ({"dtype": torch.bfloat16}, "mixtral", "no such|expected shape|fingerprint"),
    "other names": ({"dtype": torch.bfloat16}, "transposed_gpt2", "no such"),
}


@pytest.mark.parametrize("case", BASES)
def test_a_wrong_base_is_refused_by_every_loader(folder, case):
    """At once by PEFT; by transformers' own loader, which calls nothing of ours, before the first result."""
    options, name, message = BASES[case]
    with refuses(message):
        PeftModel.from_pretrained(tiny.build(name, **options), folder)

    def native():
        model = tiny.build(name, **options)
        model.load_adapter(folder)
        logits(model, name)

    with refuses(message):
        native()


def test_a_wrong_base_is_not_merged(folder):
    model = tiny.build("gqa_llama", dtype=torch.bfloat16)
    model.load_adapter(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    layer = next(m for m in model.modules() if type(m).__name__ == "DeltaLayer")
    with refuses("fingerprint"):
        layer.merge()
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def spoil(source, target, part, change):
    """A copy of a folder with one tensor changed and no hash, as transformers writes it."""
    shutil.copytree(source, target)
    tensors = safetensors.torch.load_file(f"{target}/{WEIGHTS}")
    key = next(k for k, t in tensors.items() if part in k and t.numel() > 3)
    tensors[key] = change(tensors[key].clone()).contiguous()
    safetensors.torch.save_file(tensors, f"{target}/{WEIGHTS}")
    settings = json.loads((target / CONFIG).read_text())
    (target / CONFIG).write_text(json.dumps(settings | {"sha256": None}))
    return str(target)


def put(tensor, position, value):
    tensor.view(-1)[position] = value
    return tensor


DAMAGES = {
    "out of range": ("indices", lambda t: put(t, -1, torch.iinfo(t.dtype).max), "must lie in|blocks"),
    "negative": ("indices", lambda t: put(t, 0, -2), "must lie in|sorted"),
    "repeated": ("indices", lambda t: put(t, 1, int(t[0])), "duplicates"),
    "NaN": ("values", lambda t: put(t, 3, float("nan")), "finite"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensors_never_reach_a_forward(folder, damage, tmp_path):
    part, change, message = DAMAGES[damage]
    path = spoil(folder, tmp_path / "spoiled", part, change)
    base = tiny.build("gqa_llama", dtype=torch.bfloat16)
    with refuses(message):
        PeftModel.from_pretrained(base, path)
    native = tiny.build("gqa_llama", dtype=torch.bfloat16)
    native.load_adapter(path)
    with refuses(message):
        logits(native)
    with refuses(message):
        Delta.load(path)


SEALED = {  # the hash in the config is that of the damaged file, or none
    "cut": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-8]), "not safetensors"),
    "values of another shape": (lambda f: retensor(f, "values", lambda t: t[..., :1]), r"values of shape \["),
    "values dropped": (lambda f: retensor(f, "values", None), "has no 'base_model"),
    "a pipe": (lambda f: ((f / WEIGHTS).unlink(), os.mkfifo(f / WEIGHTS)), "missing"),
    "no places": (lambda f: rewrite(f, parameters=None), "parameters is damaged, not a mapping"),
    "modules without weights": (lambda f: rewrite(f, modules_to_save=["lm_head"]), r"holds nothing of \['lm_head'\]"),
    "modules of a number": (
        lambda f: rewrite(f, modules_to_save=1e308),
        r"modules_to_save=1e\+308: wanted is list\[str\] \| None",
    ),
    "a hash of a number": (lambda f: rewrite(f, sha256=5), "sha256=5: wanted is str"),
    "two fields": (lambda f: rewrite(f, method=[1], inference_mode="x"), "method=.*inference_mode=|inference_mode=.*method="),
}


def retensor(folder, part, change):
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    key = next(key for key in tensors if part in key)
    old = tensors.pop(key)
    safetensors.torch.save_file(tensors if change is None else tensors | {key: change(old).contiguous()}, folder / WEIGHTS)


@pytest.mark.parametrize("damage", SEALED)
def test_what_delta_load_refuses_peft_never_begins_to_load(folder, damage, tmp_path):
    """PEFT and safetensors would end in errors of their own, or load what fits."""
    spoil_, message = SEALED[damage]
    place = tmp_path / "spoiled"
    shutil.copytree(folder, place)
    rewrite(place, sha256=None)
    spoil_(place)
    base = tiny.build("gqa_llama", dtype=torch.bfloat16)
    with refuses(message):
        PeftModel.from_pretrained(base, place)
    assert same(base, tiny.build("gqa_llama", dtype=torch.bfloat16))


def test_a_broken_hash_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "a")
    raw = bytearray((tmp_path / "a" / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (tmp_path / "a" / WEIGHTS).write_bytes(raw)
    with refuses("damaged or truncated"):
        PeftModel.from_pretrained(tiny.build("gqa_llama", dtype=torch.bfloat16), tmp_path / "a")


def test_an_adapter_without_tensors_is_refused(folder):
    config = DeltaConfig.from_pretrained(folder)
    with refuses("never loaded"):
        logits(get_peft_model(tiny.build("gqa_llama", dtype=torch.bfloat16), config))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_a_quantized_base_is_refused_by_name(tmp_path):
    """Real 8-bit weights, by PyTorch's own quantization."""
    folder = delta_folder(tmp_path, {"name": "s2ft"} | S2FT)

    def eight_bit():
        return torch.ao.quantization.quantize_dynamic(tiny.build("gqa_llama"), {nn.Linear}, dtype=torch.qint8)

    for config in (S2FTConfig(**S2FT), DeltaConfig(method=RANDOM), S2FTConfig(**S2FT, target_modules=["down_proj"])):
        with refuses("model.layers.0.self_attn.q_proj: quantized"):
            get_peft_model(eight_bit(), config)
    with refuses("model.layers.0.*quantized"):
        PeftModel.from_pretrained(eight_bit(), folder)


class Stored(nn.Module):
    """A module that stores its weight in integers, as 4-bit layers do."""

    def __init__(self):
        super().__init__()
        self.packed = nn.Linear(4, 4)
        self.packed.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)


def test_packed_integers_are_refused():
    with refuses("packed: quantized"):
        get_peft_model(Stored(), S2FTConfig(target_modules=["packed"]))
    selection = Selection({"packed.weight": Whole((8, 1))})
    record = {"kind": "whole", "shape": [8, 1], "dtype": "float32", "fingerprint": "0"}
    assert selection.size == 8
    with refuses("packed.weight: stored as torch.uint8"):
        get_peft_model(Stored(), DeltaConfig(method={}, parameters={"packed.weight": record}))


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.own = nn.Parameter(torch.ones(3))
        self.rnn = nn.LSTM(3, 3)
        self.attention = nn.MultiheadAttention(4, 2)
        self.outer = nn.Module()
        self.outer.scale = nn.Parameter(torch.ones(2))
        self.outer.inner = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("include", "message"),
    [
        (("own",), "own: belongs to the model itself"),
        (("rnn*",), "rnn.*LSTM keeps its own copies"),
        (("attention.out_proj*",), "out_proj.*MultiheadAttention reads this weight past any wrapper"),
        (("outer*",), "outer.inner: lies inside outer"),
    ],
)
def test_wrappers_that_would_be_passed_over_are_refused(include, message):
    model = Odd()
    with refuses(message):
        get_peft_model(model, DeltaConfig(method={"name": "full", "include": list(include)}))
    assert not any(type(m).__name__ == "DeltaLayer" for m in model.modules())


def test_a_second_adapter_around_the_first_is_refused():
    model = get_peft_model(Odd(), DeltaConfig(method={"name": "full", "include": ["outer.inner*"]}))
    with refuses("lies inside outer"):
        model.add_adapter("other", DeltaConfig(method={"name": "full", "include": ["outer.scale"]}))
    assert list(model.peft_config) == ["default"]


def test_adapters_are_chosen_in_the_bare_base():
    model = trained(S2FTConfig(**S2FT))
    model.merge_adapter()
    with refuses("merged.*unmerge_adapter"):
        model.add_adapter("other", DeltaConfig(method=RANDOM))
    model.unmerge_adapter()
    model.add_adapter("other", DeltaConfig(method=RANDOM))
    alone = get_peft_model(tiny.build("gqa_llama"), DeltaConfig(method=RANDOM))
    assert model.peft_config["other"].parameters == alone.peft_config["default"].parameters


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: S2FTConfig(down=1.5), "down=1.5: a count of units must be"),
        (lambda: S2FTConfig(method=RANDOM), "give the shares"),
        (lambda: S2FTConfig(layers_pattern="layers"), "layers_to_transform"),
        (lambda: S2FTConfig(target_modules=".*", layers_to_transform=[0]), "when `target_modules` is a str"),
        (lambda: DeltaConfig(), "method.name=None: unknown"),
        (lambda: DeltaConfig(method={"name": "randm"}), "did you mean 'random'"),
        (lambda: DeltaConfig(method=RANDOM, format_version=99), "format version 99"),
        (lambda: DeltaConfig(method={}, parameters={"w": {"kind": "code", "fingerprint": ""}}).records, "w: .*unknown kind"),
        (lambda: DeltaConfig(method={}, parameters=[]).records, "not a mapping"),
        (lambda: get_peft_model(tiny.build("gqa_llama"), S2FTConfig(target_modules=["q_proj"])), "q_proj.*give q="),
        (lambda: get_peft_model(tiny.build("gqa_llama"), S2FTConfig(target_modules=["norm"])), "norm is a LlamaRMSNorm"),
        (
            lambda: get_peft_model(tiny.build("gqa_llama"), S2FTConfig(target_modules=["nothing"])),
            "its linear layers are called down_proj",
        ),
        (lambda: get_peft_model(tiny.build("gqa_llama"), S2FTConfig(**S2FT, layers_to_transform=[9])), "leave nothing"),
        (lambda: get_peft_model(tiny.build("gqa_llama"), S2FTConfig(target_modules=["lm_head"], down=3)), "as a float down"),
        (lambda: get_peft_model(tiny.build("gqa_llama"), S2FTConfig(**S2FT, select="activation")), "probe"),
        (lambda: get_peft_model(tiny.build("gqa_llama"), S2FTConfig(**S2FT), adapter_name="a/b"), "adapter name 'a/b'"),
        (lambda: trained(S2FTConfig(**S2FT), steps=0).add_weighted_adapter(["default"], [1.0], "x"), "not differences"),
    ],
)
def test_mistakes_are_answered(make, message):
    with refuses(message):
        make()


def test_a_config_describes_one_base():
    config = S2FTConfig(**S2FT)
    get_peft_model(tiny.build("gqa_llama"), config)
    get_peft_model(tiny.build("gqa_llama"), config)
    with refuses("S2FTConfig: already describes an adapter of another base"):
        get_peft_model(tiny.build("gqa_llama", seed=1), config)


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings:UserWarning")  # PEFT says so too
def test_tied_and_token_embeddings_are_not_changed_by_halves():
    whole = {"name": "full", "include": ["model.embed_tokens*"]}
    for restriction in ({"modules_to_save": ["lm_head"]}, {"exclude_modules": ["lm_head"]}):
        with refuses("lm_head.weight: is model.embed_tokens.weight"):
            get_peft_model(tiny.build("tied_llama"), DeltaConfig(method=whole, **restriction))
    for tokens in ([3], {"embed_tokens": [3]}):
        with refuses("embed_tokens.weight: trainable_token_indices"):
            get_peft_model(tiny.build("gqa_llama"), DeltaConfig(method=whole, trainable_token_indices=tokens))


def test_values_that_overflow_are_found_by_a_safe_merge():
    model = trained(S2FTConfig(**S2FT), steps=0)
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    layer.intaglio_values["default"]["weight"].data[0] = float("inf")
    with refuses("adapter default seems to be broken"):
        model.merge_adapter(safe_merge=True)


def test_a_scalar_and_an_embedding(tmp_path):
    """Elements of any shape, a 0-D parameter among them."""

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(5, 3)
            self.gain = nn.Module()
            self.gain.scale = nn.Parameter(torch.tensor(2.0))
            self.gain.forward = lambda x: x * 1.0

        def forward(self, ids):
            return self.gain(self.embed(ids))

    entries = {"embed.weight": Elements((5, 3), torch.tensor([0, 4])), "gain.scale": Whole(())}
    parameters = dict(Small().named_parameters())
    values = {name: entry.gather(parameters[name]) + 1 for name, entry in entries.items()}
    prints = {name: fingerprint(entry.gather(parameters[name])) for name, entry in entries.items()}
    Delta(Selection(entries), values, prints).save(tmp_path / "a")
    model, expected = PeftModel.from_pretrained(Small(), tmp_path / "a"), Small()
    Delta.load(tmp_path / "a").apply_(expected)
    ids = torch.arange(5)
    assert torch.equal(model(ids), expected(ids))
    merged = model.merge_and_unload()
    assert all(torch.equal(a, b) for a, b in zip(merged.state_dict().values(), expected.state_dict().values(), strict=True))


@pytest.mark.parametrize("targets", [None, ["down_proj"]])
def test_layers_to_transform_keeps_the_budget(targets):
    """What a count names is trained in the layers that are left."""
    config = S2FTConfig(o=None, down=10, layers_to_transform=[1], target_modules=targets)
    model = get_peft_model(tiny.build("gqa_llama"), config)
    ((name, entries),) = model.peft_config["default"].chosen.items()
    assert name == "model.layers.1.mlp.down_proj.weight"
    assert len(entries.index) == 10
