"""Orders and reports: their words, their signatures, whether to obey, and what was done.
Start with orders.py, then acceptance.py.
"""
