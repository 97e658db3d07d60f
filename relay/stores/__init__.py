"""Where chunks and documents lie: the contract of a store, and the stores that keep it.
Start with contract.py, then memory.py, the shortest store.
"""
