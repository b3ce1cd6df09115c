"""Speed of ops and of the engine; docs/benchmarks.md says how to measure and to read it."""
