"""The orchestrator's own store, and how packages come into it.
Start with depot.py.
"""
