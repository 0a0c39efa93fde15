"""A differential fuzz: random sequences of calls on an index, beside a float64 model of it and beside faiss.

`python -m tests.fuzz --seconds 600` runs it. The parts:

* vectors.py: the kinds of data, all made from a name, a size and a seed;
* model.py: what an index must hold, and which rows a query must and may find;
* answers.py: searches of every kind, compared with the model;
* against_faiss.py: the same queries answered by faiss;
* machine.py: the calls that a sequence is made of, as rules of a hypothesis state machine;
* __main__.py: the command: time limit, progress, and the report of a mismatch.
"""
