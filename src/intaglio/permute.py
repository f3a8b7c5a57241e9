"""`co_permute` and `Layout`, by the path that users import them by."""

from .model.permute import Layout as Layout
from .model.permute import co_permute as co_permute
