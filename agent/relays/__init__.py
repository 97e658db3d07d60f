"""Which relays there are, and in which order to ask them.
Start with ranking.py.
"""
