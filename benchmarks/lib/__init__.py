"""Common parts of the benchmarks: contestants, processes that take turns, tables, pictures and result files."""
