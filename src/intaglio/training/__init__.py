"""How a choice is trained: compact values in slots, their gradients, and what goes on choosing while a run trains."""
