"""One machine: it pulls packages, obeys signed orders, and reports.
Start with service.py, the story; platform.py holds all that differs by system.
"""
