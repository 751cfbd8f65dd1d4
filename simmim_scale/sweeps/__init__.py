"""Sweeps: a base configuration and axes become named runs, which are started, skipped or resumed, and collected into a table.

`spec.py` is the file format, `expand.py` the runs (pure), `run.py` carries them out, `collect.py` and `page.py` show them.
"""
