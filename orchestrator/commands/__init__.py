"""The command line: these files parse what was typed, and print.
Start with release.py.
"""
