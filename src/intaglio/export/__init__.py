"""Forms in which other programs load an adapter, each proved before it appears."""
