"""The instrument: measure the index beside other libraries, store the figures, draw them.

`python -m benchmarks run` measures and appends JSON lines; `python -m benchmarks report` only reads them.
"""
