"""Lines with a known rate and latency: a proxy, and network namespaces.
Start with network.py.
"""
