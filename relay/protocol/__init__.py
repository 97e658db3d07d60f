"""The protocol between relays and all that speaks to them.
Start with messages.py, which both sides read.
"""
