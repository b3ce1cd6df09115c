"""Speed of ops and of the engine. One file per op: `python -m pytest benchmarks/bench_gae.py`."""
