"""What stands between handlers and the network: connections, access, tokens, bodies, problems.
Start with listen.py.
"""
