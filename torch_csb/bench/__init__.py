"""Benchmarks: `python -m torch_csb.bench overhead | quick`."""
