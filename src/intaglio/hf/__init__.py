"""The types of our adapters for PEFT and the Trainer's callback.

Importing this package registers the types with PEFT: after `import intaglio.hf`, `PeftModel.from_pretrained(base, folder)`
reads every adapter folder, and bottleneck adapters, a type of their own.
"""

from ..peft_tuners import BottleneckConfig, DeltaConfig, S2FTConfig, register
from .callback import ISTCallback

__all__ = ["BottleneckConfig", "DeltaConfig", "ISTCallback", "S2FTConfig"]

register()
