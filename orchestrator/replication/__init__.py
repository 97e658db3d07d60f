"""Packages to relays: from here, or from relay to relay.
Start with send.py, then cascade.py.
"""
