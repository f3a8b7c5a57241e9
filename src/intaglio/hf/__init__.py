"""Where Intaglio meets the Hugging Face stack.

Importing this package teaches PEFT the type of our adapters: after `import intaglio.hf`, `PeftModel.from_pretrained(base,
folder)` reads every adapter folder. It also brings bottleneck adapters, a type of their own.
"""

from .bottleneck import BottleneckConfig
from .callback import ISTCallback
from .peft import DeltaConfig, S2FTConfig

__all__ = ["BottleneckConfig", "DeltaConfig", "ISTCallback", "S2FTConfig"]
