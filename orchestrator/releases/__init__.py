"""A release: what is frozen and signed of it, and where its packages come from.
Start with release.py.
"""
