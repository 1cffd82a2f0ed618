"""Checkpoints in other engines' formats: what all of them share. `export.py` and `adopt.py` are the two ways."""
