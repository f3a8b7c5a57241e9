"""`read_lora` and `to_delta`, by the path that users import them by."""

from ..export.from_lora import read_lora as read_lora
from ..export.from_lora import to_delta as to_delta
