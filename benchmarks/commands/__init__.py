"""Commands of `python -m benchmarks`, one file each (the sweeps share one)."""
