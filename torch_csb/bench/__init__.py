"""Benchmarks: `python -m torch_csb.bench --help`; docs/benchmarking.md says how to read them."""
