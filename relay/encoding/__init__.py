"""How chunks travel: bundles of runs, their encodings, and which encoding is chosen.
Start with bundle.py, then planner.py.
"""
