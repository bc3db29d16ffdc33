"""Benchmarks of methods against each other: `python -m pisa_dist.benchmark heterogeneity`."""
