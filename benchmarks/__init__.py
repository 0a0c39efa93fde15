"""Measure the index beside other libraries, store the figures, write the report: `python -m benchmarks COMMAND`."""
