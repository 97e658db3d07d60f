"""Scripts: each run at most once, by a small process that outlives its starter.
Start with runner.py, then runs.py.
"""
