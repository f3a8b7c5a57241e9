"""A base, adapters in every form, and our plugin among vLLM's."""

import importlib.metadata

import pytest
import torch

from intaglio.core.entries import Elements
from intaglio.core.selection import Selection
from intaglio.export.gguf import to_gguf
from intaglio.export.lora import to_lora
from support import tiny
from support.doctor import places
from support.exports import handmade


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A base as a folder, and the model."""
    from transformers import AutoModelForCausalLM

    folder = tiny.save_folder(tmp_path_factory.mktemp("base") / "base")
    return folder, AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="session")
def shelf(base, tmp_path_factory):
    """Adapters in every form, by name; those that name a base name this folder."""
    folder, model = base
    place = tmp_path_factory.mktemp("shelf")

    def make(name, selection, write, named=True, **options):
        delta = handmade(model, selection)
        delta.base = folder if named else None
        write(delta, model, place / name, **options)

    def save(delta, model, path):
        delta.save(path)

    make("plain", places(model, down=6, o=3), to_lora)
    make("small", places(model, down=1), to_lora)
    make("rows", places(model, v=2, up=9), to_lora)
    make("nameless", places(model, down=6), to_lora, named=False)
    make("ragged", places(model, down=6, o=3), to_lora, ragged=True)
    make("one-layer", places(model, (1,), down=6), to_lora)
    make("filled", places(model, (1,), down=6), to_lora, fill_layers=True)
    make("gguf", places(model, down=6, o=3), to_gguf)
    make("delta", places(model, down=6, o=3), save)
    make("delta-one-layer", places(model, (1,), down=6), save)
    projections = {name: weight for name, weight in model.named_parameters() if name.endswith("proj.weight")}
    chosen = {name: Elements(tuple(weight.shape), torch.arange(0, weight.numel(), 100)) for name, weight in projections.items()}
    make("scattered", Selection(chosen), save)
    return place


@pytest.fixture
def plugin(monkeypatch):
    """Our plugin among vLLM's, and an environment that does not speak of it."""
    point = importlib.metadata.EntryPoint("intaglio", "intaglio.vllm_plugin:register", "vllm.general_plugins")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: (point,))
    for name in ("INTAGLIO_VLLM", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
