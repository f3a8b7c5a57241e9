"""What a model is made of: its layers, heads and channels, what calibration measures of them, and how PEFT wraps them."""
