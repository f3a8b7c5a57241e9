"""Our types of adapters inside PEFT."""
