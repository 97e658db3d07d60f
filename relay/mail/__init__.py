"""Letters that wait at a relay for agents and orchestrators. The relay reads none of them.
Start with mailbox.py.
"""
