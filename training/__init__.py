"""Training of DivRegNet's models, their evaluation, the benchmark and the paper's experiments.

An editable install (``pip install -e ".[training]"``) makes this package importable from everywhere; a wheel for users
does not contain it. Every program in it runs as ``python training/NAME.py``.
"""
