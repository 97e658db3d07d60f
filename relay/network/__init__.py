"""What every client of ours does alike on a network: where names lead, which addresses it tries, through which proxy.
Start with way.py and proxies.py; how often it tries again is relay/support/persistence.py.
"""
