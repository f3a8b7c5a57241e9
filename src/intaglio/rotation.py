"""Which layers train now: draws, probes and what follows from them, applied to a model."""
