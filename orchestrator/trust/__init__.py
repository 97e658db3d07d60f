"""Keys that sign packages and orders; secrets, read when they are needed.
Start with keyring.py.
"""
