"""Sparse adapters in vLLM, experimental: index and values in the slots, instead of LoRA's two factors."""
