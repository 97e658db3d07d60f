"""The audit trail: what happened, as events with a name and fields, one for each act, over Python's own logging.
Start with event.py; acts.py has every event of a relay, log.py decides where they go and in which form.
"""
