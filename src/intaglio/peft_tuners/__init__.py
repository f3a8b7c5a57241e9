"""Our types of adapters inside PEFT: sparse ones of any method, and bottleneck adapters."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .bottleneck_config import BottleneckConfig
from .bottleneck_model import BottleneckModel
from .delta_config import DeltaConfig
from .delta_model import DeltaModel
from .s2ft_config import S2FTConfig

__all__ = ["BottleneckConfig", "DeltaConfig", "S2FTConfig", "register"]


def register() -> None:
    """Teach PEFT our types, by the three dictionaries through which it looks types up; a second call changes nothing."""
    for config, model in ((DeltaConfig, DeltaModel), (BottleneckConfig, BottleneckModel)):
        PEFT_TYPE_TO_CONFIG_MAPPING[config.TYPE] = config  # type: ignore[index]  # PEFT looks types up as strings
        PEFT_TYPE_TO_TUNER_MAPPING[config.TYPE] = model  # type: ignore[index]
        PEFT_TYPE_TO_PREFIX_MAPPING[config.TYPE] = model.prefix  # type: ignore[index]
