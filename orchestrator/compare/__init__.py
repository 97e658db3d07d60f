"""Two builds of one package side by side. Pure, but for read_package.py.
Start with diff.py.
"""
