"""Where Intaglio meets the Hugging Face stack.

Importing this package teaches PEFT the type of our adapters: after `import intaglio.hf`, `PeftModel.from_pretrained(base,
folder)` reads every adapter folder. It also brings bottleneck adapters, a type of their own.
"""

from ..peft_tuners.bottleneck import BottleneckConfig
from ..peft_tuners.delta_model import DeltaConfig, S2FTConfig
from .callback import ISTCallback

__all__ = ["BottleneckConfig", "DeltaConfig", "ISTCallback", "S2FTConfig"]
