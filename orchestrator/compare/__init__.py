"""Two builds of one package side by side. Pure.
Start with diff.py.
"""
