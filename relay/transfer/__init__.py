"""The two ends of a line: sending what the far side lacks, fetching what this side lacks.
Start with replicate.py, run_queue.py and download.py.
"""
