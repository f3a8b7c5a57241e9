"""Score a model's answers: batched greedy generation, counts and intervals."""

from .generate import generate_answers
from .score import Score, evaluate

__all__ = ["Score", "evaluate", "generate_answers"]
