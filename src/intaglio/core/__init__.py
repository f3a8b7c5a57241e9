"""What may change, as pure values, and the small ground that everything stands on. Torch only."""
