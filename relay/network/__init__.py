"""What every client of ours does alike on a network: which addresses it tries, and through which proxy it goes.
Start with proxies.py; how often it tries again is relay/support/persistence.py.
"""
