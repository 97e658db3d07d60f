"""Which machine is next, and what is next on it. Pure folds over what happened.
Start with rolling.py, then turn.py.
"""
