"""The machines of a deployment, reached through relays.
Start with fleet.py.
"""
