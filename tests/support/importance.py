"""Planted importance, and models of several architectures whose layers have it."""

import peft
import torch
import transformers as tf
from torch import nn

from support import tiny
from support.layers import stack


def record(paths, seed=0, spread=1.0):
    """The record of a run whose layers have planted importance."""
    importance = torch.randn(len(paths), generator=torch.Generator().manual_seed(seed)) * spread
    return {"layers": list(paths), "importance": importance.tolist(), "probes": 9, "skipped": 0, "method": {"name": "ist"}}


def llama(layers=12):
    return stack(layers), [f"model.layers.{i}" for i in range(layers)], ["q_proj", "down_proj"]


def gpt2(bare=False):
    config = tf.GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=12, n_head=4, n_inner=48)
    model = tf.GPT2Model(config) if bare else tf.GPT2LMHeadModel(config)
    return model, [f"{'' if bare else 'transformer.'}h.{i}" for i in range(12)], ["c_attn", "mlp.c_proj"]


def bert():
    model = tf.BertForSequenceClassification(tf.BertConfig(**(tiny.COMMON | {"num_hidden_layers": 12})))
    return model, [f"bert.encoder.layer.{i}" for i in range(12)], ["query", "output.dense"]


def t5():
    model = tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, decoder_start_token_id=0)
    )
    return model, [f"{side}.block.{i}" for side in ("encoder", "decoder") for i in range(3)], ["q", "wo"]


class Plain(nn.Module):
    """Two stacks at the root, whose layers are the adapted modules themselves."""

    def __init__(self):
        super().__init__()
        self.ups, self.downs = (nn.ModuleList(nn.Linear(8, 8) for _ in range(4)) for _ in range(2))


MODELS = {
    "llama": llama,
    "gpt2": gpt2,
    "bare gpt2": lambda: gpt2(bare=True),
    "bert": bert,
    "t5": t5,
    "plain": lambda: (Plain(), [f"{s}.{i}" for s in ("ups", "downs") for i in range(4)], r"(ups|downs)\.\d"),
}
FAN = {name: {"fan_in_fan_out": True} if "gpt2" in name else {} for name in MODELS}
ROOT = {"bare gpt2": {"layers_pattern": "h"}}


def placed(model):
    """Path in the base of each LoRA layer → its rank."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    return {name.removeprefix("base_model.model."): layer.r["default"] for name, layer in found.items()}


def layer_of(path, layers):
    return next((layer for layer in layers if path == layer or path.startswith(f"{layer}.")), None)
