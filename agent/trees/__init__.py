"""Packages on this machine's disk: pulled, verified, installed, switched.
Start with pull.py.
"""
