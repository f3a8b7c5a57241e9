"""The ways to fine-tune that `step.py` compares, and a training step of any of them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
READERS = ["o_proj", "down_proj"]


def floor(model: nn.Module, rank: int) -> Step:
    """Forward and the gradient of the inputs alone: what no method that reaches the first layer can go below."""
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    return Step(model, [])


def full(model: nn.Module, rank: int) -> Step:
    """Every weight."""
    return Step(model, list(model.parameters()))


def lisa(model: nn.Module, rank: int) -> Step:
    """Two whole layers, embeddings and head (LISA, between two of its draws)."""
    model.requires_grad_(False)
    layers = model.model.layers
    for module in (layers[len(layers) // 3], layers[2 * len(layers) // 3], model.get_input_embeddings(), model.lm_head):
        module.requires_grad_(True)
    return Step(model, [p for p in model.parameters() if p.requires_grad])


def lora(model: nn.Module, rank: int) -> Step:
    """PEFT's LoRA on all linear layers, its factors in the base's type."""
    from peft import LoraConfig

    return _peft(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=ALL_LINEAR))


def lora_fp32(model: nn.Module, rank: int) -> Step:
    """The same with PEFT's default: fp32 factors, for which inputs of another type are copied."""
    from peft import LoraConfig

    return _peft(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=ALL_LINEAR), autocast_adapter_dtype=True)


def lora_same_targets(model: nn.Module, rank: int) -> Step:
    """PEFT's LoRA on o and down, as many trainable numbers."""
    from peft import LoraConfig

    widths = sum(sum(m.weight.shape) for n, m in model.named_modules() if n.endswith(tuple(READERS)))
    return _peft(model, LoraConfig(r=round(trainable(model, rank) / widths), target_modules=READERS))


def dora(model: nn.Module, rank: int) -> Step:
    """PEFT's DoRA on all linear layers."""
    from peft import LoraConfig

    return _peft(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=ALL_LINEAR, use_dora=True))


def shira(model: nn.Module, rank: int) -> Step:
    """PEFT's SHiRA on all linear layers."""
    from peft import ShiraConfig

    return _peft(model, ShiraConfig(r=rank, target_modules=ALL_LINEAR, random_seed=0))


def s2ft(model: nn.Module, rank: int, *, permute: bool = False) -> Step:
    """S2FT on o and down in index form, half of the numbers in each."""
    from intaglio import attach

    tuner = attach(model, s2ft_method(model, rank), permute=permute)
    return Step(model, tuner.parameters(), tuner.watch)


def s2ft_permuted(model: nn.Module, rank: int) -> Step:
    """S2FT with co-permuted heads and channels."""
    return s2ft(model, rank, permute=True)


def s2ft_peft(model: nn.Module, rank: int) -> Step:
    """S2FT through PEFT: get_peft_model(model, S2FTConfig(…))."""
    from intaglio.hf import S2FTConfig

    method = s2ft_method(model, rank)
    return _peft(model, S2FTConfig(o=method.o, down=method.down))


CONTESTANTS: dict[str, tuple[str, Callable[[nn.Module, int], Step]]] = {
    "floor": ("frozen floor", floor),
    "s2ft": ("S2FT, index form", s2ft),
    "s2ft_permuted": ("S2FT, permuted", s2ft_permuted),
    "s2ft_peft": ("S2FT, PEFT face", s2ft_peft),
    "lora": ("LoRA, all linear", lora),
    "lora_fp32": ("LoRA, fp32 factors", lora_fp32),
    "lora_same_targets": ("LoRA, o and down", lora_same_targets),
    "dora": ("DoRA, all linear", dora),
    "shira": ("SHiRA, all linear", shira),
    "lisa": ("LISA-like, 2 layers", lisa),
    "full": ("full fine-tuning", full),
}


class Step:
    """One contestant: a model, what it trains, and the parts of a step."""

    def __init__(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        watch: Callable[[torch.optim.Optimizer], torch.optim.Optimizer] = lambda optimizer: optimizer,
    ) -> None:
        self.model, self.trainable = model, sum(p.numel() for p in parameters)
        self.optimizer: torch.optim.Optimizer | None = None
        if parameters:
            self.optimizer = watch(torch.optim.AdamW(parameters, lr=1e-4))

    def run(self, batch: dict[str, torch.Tensor]) -> dict[str, float]:
        """Seconds of forward, backward and optimizer."""
        marks = [_now()]
        loss = self.model(**batch).loss
        marks.append(_now())
        loss.backward()
        marks.append(_now())
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        marks.append(_now())
        forward, backward, optimizer = (after - before for before, after in itertools.pairwise(marks))
        return {"forward": forward, "backward": backward, "optimizer": optimizer, "total": marks[-1] - marks[0]}

    def bytes_kept(self, batch: dict[str, torch.Tensor], *, keep_gradients: bool = False) -> dict[str, int]:
        """Bytes alive for backward beside parameters and buffers: in all, and without the head and its loss."""
        own = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}
        kept: dict[int, int] = {}
        at_head: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):  # SHiRA saves sparse ones
                storage = part.untyped_storage()
                if storage.data_ptr() not in own:
                    kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        head = self.model.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda module, inputs: at_head.append(sum(kept.values())))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.model(**batch).loss
        handle.remove()
        loss.backward()
        if self.optimizer is not None and not keep_gradients:
            self.optimizer.zero_grad(set_to_none=True)
        return {"kept": sum(kept.values()), "kept_in_layers": at_head[0]}


def _peft(model: nn.Module, config: Any, *, autocast_adapter_dtype: bool = False) -> Step:
    from peft import get_peft_model

    wrapped = get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
    return Step(wrapped, [p for p in wrapped.parameters() if p.requires_grad])


def trainable(model: nn.Module, rank: int) -> int:
    """Trainable numbers of LoRA on all linear layers: what the others match."""
    return rank * sum(sum(m.weight.shape) for n, m in model.named_modules() if n.endswith(tuple(ALL_LINEAR)))


def s2ft_method(model: nn.Module, rank: int) -> Any:
    """S2FT on o and down with as many trainable numbers as LoRA of that rank has, half of them in each."""
    from intaglio import S2FT

    config = model.config
    head = config.hidden_size * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    wanted = trainable(model, rank)
    heads = max(1, round(wanted / 2 / head))
    return S2FT(o=heads, down=max(1, round((wanted - heads * head) / config.hidden_size)))


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
