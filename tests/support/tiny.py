"""Tiny models built from configs, one per structural trait; no downloads."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable

import torch
import transformers as tf
from torch import nn

from intaglio import Batches
from intaglio.method_kinds.method import Method

from .layouts import CHANNELS as CHANNELS
from .layouts import FIXED_HEADS as FIXED_HEADS
from .layouts import LAYOUTS, TRAITS

COMMON = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
LLAMA = COMMON | {
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def _llama(**kw: object) -> tf.PreTrainedModel:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**(LLAMA | {"num_key_value_heads": 4} | kw)))


def _gpt2() -> tf.PreTrainedModel:
    config = tf.GPT2Config(
        vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4, n_inner=48,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return tf.GPT2LMHeadModel(config)


def _opt() -> tf.PreTrainedModel:
    config = tf.OPTConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, max_position_embeddings=64,
        word_embed_proj_dim=32, dropout=0.0, attention_dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return tf.OPTForCausalLM(config)


def _encoder(config: type, model: type, **kw: object) -> tf.PreTrainedModel:
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return model(config(**(COMMON | dropout | {"max_position_embeddings": 64, "pad_token_id": 0} | kw)))


CAUSAL: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "mha_llama": _llama,
    "gqa_llama": lambda: _llama(num_key_value_heads=2),
    "mqa_llama": lambda: _llama(num_key_value_heads=1),
    "tied_llama": lambda: _llama(tie_word_embeddings=True),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**LLAMA, num_key_value_heads=2)),
    "qkv_bias_qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**LLAMA, num_key_value_heads=2)),
    "head_dim_qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**LLAMA, num_key_value_heads=2, head_dim=16)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**LLAMA, num_key_value_heads=1, head_dim=16)),
    "qk_norm_olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**LLAMA, num_key_value_heads=2)),
    "fused_phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**LLAMA, num_key_value_heads=2)),
    "transposed_gpt2": _gpt2,
    "interleaved_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**LLAMA)),
    "opt": _opt,
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**LLAMA, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2)
    ),
    "qwen2_moe": lambda: tf.Qwen2MoeForCausalLM(
        tf.Qwen2MoeConfig(
            **LLAMA,
            num_key_value_heads=2,
            num_experts=3,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=16,
            decoder_sparse_step=2,
        )
    ),
    **TRAITS,
}
ENCODERS: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "bert": lambda: _encoder(tf.BertConfig, tf.BertForSequenceClassification),
    "roberta": lambda: _encoder(tf.RobertaConfig, tf.RobertaForSequenceClassification),
    "deberta": lambda: _encoder(
        tf.DebertaConfig, tf.DebertaForSequenceClassification, relative_attention=True, pos_att_type=["c2p", "p2c"]
    ),
    "deberta_v2": lambda: _encoder(tf.DebertaV2Config, tf.DebertaV2ForSequenceClassification),
}
MODELS = CAUSAL | ENCODERS
CLASSIFIERS = {*ENCODERS, "modernbert", "distilbert", "albert"}
MIXTURES = ("mixtral", "qwen2_moe", "experts_gpt_oss", "latent_deepseek_v3")  # all experts of a layer in one 3-D weight
DESCRIBED = ChainMap(MODELS, LAYOUTS)  # heads and channels of every layer


def build(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> tf.PreTrainedModel:
    """The named tiny model with every parameter randomised, norms, biases and padding rows too."""
    torch.manual_seed(seed)
    model = (DESCRIBED | CHANNELS)[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    if name not in MODELS or name in MIXTURES:
        model.set_experts_implementation("eager")  # the default, grouped products, knows no fp64
    return model.to(dtype).eval()


def batch(name: str, *, rows: int = 3, length: int = 12, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (rows, length), generator=generator)
    labels = ids.clone() if name not in CLASSIFIERS else torch.randint(0, 2, (rows,), generator=generator)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return made | ({"decoder_input_ids": ids} if name == "t5" else {})


def probe(name: str, method: Method) -> Batches | None:
    """Data for a method that looks at data."""
    return Batches([batch(name, seed=7)]) if method.needs_probe else None


class Homemade(nn.Module):
    """A stack nobody has a row for: its FFN is found by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(HomemadeBlock() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class HomemadeBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)
        self.wide = nn.Linear(8, 20)
        self.narrow = nn.Linear(20, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.narrow(torch.relu(self.wide(self.mix(x))))


def save_folder(path: object, *, chat: bool = True, seed: int = 0) -> str:
    """Write a tiny Llama with a byte-level tokenizer as an ordinary model folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    specials = ["<pad>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    if chat:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ '<s>' + m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
        )
    torch.manual_seed(seed)
    model = _llama(vocab_size=len(vocabulary), num_key_value_heads=2, max_position_embeddings=256)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
