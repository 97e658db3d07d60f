"""What happened, append-only, and what it means. The lock and the fence.
Start with events.py, then journal.py; views.py tells what they mean.
"""
