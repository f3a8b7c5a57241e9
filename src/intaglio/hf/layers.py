"""`layers_to_transform`, `rank_pattern` and `prune`, by the path that users import them by."""

from ..export.pruned import prune as prune
from .importance import layers_to_transform as layers_to_transform
from .importance import rank_pattern as rank_pattern
