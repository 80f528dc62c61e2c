"""Benchmarks of trajectory matching (`rmdd bench`): time, memory, and first-order against exact gradients."""
