"""What every client of ours does alike on a network: where names lead, for as long as they do.
Start with names.py.
"""
