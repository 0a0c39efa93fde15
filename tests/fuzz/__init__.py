"""A differential fuzzer: random sequences of calls on an index, compared with a float64 model of it and with faiss.

`python -m tests.fuzz --seconds 600` runs it. The parts:

* vectors.py: the kinds of data, from a name, a size and a seed;
* model.py: the expected contents of an index, and which rows a query must and may find;
* filters.py: a selector and exclusions for each query, and the rows that pass;
* answers.py: searches of every kind, compared with the model;
* against_faiss.py: the same queries with faiss;
* changes.py, moves.py, machine.py: the calls of a sequence, as rules of a hypothesis state machine;
* hard.py, codes.py: another command, `python -m tests.fuzz.codes`, for the bound of 8-bit codes;
* __main__.py: the command: time limit, progress, and the report of a mismatch.
"""
