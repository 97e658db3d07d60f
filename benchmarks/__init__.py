"""Measurements, one file each, beside what people use today; README.md holds the figures.
Start with pairs.py.
"""
