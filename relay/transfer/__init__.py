"""The two ends of a line: sending what the far side lacks, fetching what this side lacks.
Start with replicate.py and download.py.
"""
