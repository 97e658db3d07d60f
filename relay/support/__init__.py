"""Small things that know nothing of ours: the console, durable writes, rates, bounds.
Start with durable.py.
"""
