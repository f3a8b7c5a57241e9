"""What the benchmarks have in common: contestants, processes that take turns, tables, pictures and result files."""
