"""The models that training is measured on: shapes of real ones, with random weights, which cost what real weights would."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
                     "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 256},
    # no tensor above 2^20 entries: what a method holds beside one tensor's gradient shows
    "llama-73m": {"hidden_size": 512, "num_hidden_layers": 17, "num_attention_heads": 8, "intermediate_size": 2048,
                  "vocab_size": 2000},
    "llama-3.2-1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
                     "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True},
    "llama-3.2-3b": {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8,
                     "head_dim": 128, "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True},
    "llama-3-8b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                   "intermediate_size": 14336, "vocab_size": 128256},
    "llama-7b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008,
                 "vocab_size": 32000},
    "llama-13b": {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824,
                  "vocab_size": 32000},
}  # fmt: skip
# (shape, tokens per row, rows); "figure5" is that of the paper of S2FT
GRIDS: dict[str, list[tuple[str, int, int]]] = {
    "small": [("llama-73m", 16, 1), ("smollm2-135m", 16, 1), ("smollm2-135m", 128, 4)],
    "figure5": [(shape, t, b) for shape in ("llama-7b", "llama-13b") for t in (512, 1024) for b in (1, 2)],
    "llama3": [
        (shape, t, b)
        for shape in ("llama-3.2-1b", "llama-3.2-3b", "llama-3-8b")
        for t, b in ((512, 1), (512, 8), (2048, 2), (4096, 1))
    ],
}


def build(task: dict[str, Any]) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The task's model with random weights, on the GPU if there is one, and a batch for it."""
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    shape = SHAPES[task["shape"]] | task.get("changed", {})
    config = transformers.LlamaConfig(**shape, max_position_embeddings=max(2048, task["length"]), use_cache=False)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, task["dtype"]))
    model.train()
    ids = torch.randint(0, shape["vocab_size"], (task["batch"], task["length"]), device=device)
    return model, {"input_ids": ids, "labels": ids}


def size(model: nn.Module) -> int:
    """Weights of a model."""
    return sum(parameter.numel() for parameter in model.parameters())
