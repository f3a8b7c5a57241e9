"""The training of a choice: compact values in slots, their gradients, and what goes on choosing while a run trains."""
