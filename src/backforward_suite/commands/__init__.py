"""The command line: what `src/train.py`, `report.py`, `reproduce.py` and `bench.py` do."""
