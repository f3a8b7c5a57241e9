"""The parts of a model: its layers, heads and channels, what calibration measures of them, and how PEFT wraps them."""
