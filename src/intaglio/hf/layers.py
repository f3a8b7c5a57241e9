"""`layers_to_transform`, `rank_pattern` and `prune`, by the path that users import them by."""

from ..export.pruned import layers_to_transform as layers_to_transform
from ..export.pruned import prune as prune
from ..export.pruned import rank_pattern as rank_pattern
