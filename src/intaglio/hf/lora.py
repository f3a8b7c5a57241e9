"""`to_lora`, by the path that users import it by."""

from ..export.lora import to_lora as to_lora
