"""Benchmarks: correctness first, then time, ceilings and peers in the same run."""
