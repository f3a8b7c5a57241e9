"""A random two-layer Llama with a byte-level tokenizer, as an ordinary model folder, and rows to train it on."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

__all__ = ["SIZES", "model", "rows"]

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def model(folder: Path, dtype: torch.dtype = torch.float32) -> str:
    """Write the model; returns the folder's name."""
    specials = ["<pad>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    torch.manual_seed(0)
    config = tf.LlamaConfig(vocab_size=len(vocabulary), pad_token_id=0, bos_token_id=1, eos_token_id=2, **SIZES)
    tf.LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=core, **named)
    tokenizer.save_pretrained(folder)
    return str(folder)


def rows(path: Path) -> str:
    """Write 64 small products; returns the file's name."""
    lines = [{"prompt": f"{a}*{b}=", "completion": f" {a * b}"} for a in range(8) for b in range(8)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)
