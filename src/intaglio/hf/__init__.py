"""Where Intaglio meets the Hugging Face stack.

Importing this package teaches PEFT the type of our adapters: after `import intaglio.hf`, `PeftModel.from_pretrained(base,
folder)` reads every adapter folder.
"""

from .peft import DeltaConfig, S2FTConfig

__all__ = ["DeltaConfig", "S2FTConfig"]
