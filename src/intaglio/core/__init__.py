"""Pure values that say what may change, and the small ground that everything stands on. Torch only."""
