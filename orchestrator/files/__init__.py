"""What people write of releases: process and environment, variables, scripts.
Start with process.py and environment.py.
"""
