"""Deflate encoders of others, each in a process without rights.
Start with encoders.py.
"""
