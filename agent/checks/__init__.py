"""Is it well? Checks of what runs, and the text that they compare.
Start with run_checks.py.
"""
