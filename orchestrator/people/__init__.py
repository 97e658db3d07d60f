"""What people say of a deployment, signed by their keys, and what it comes to.
`statement.py` has the words; `judging.py` (pure) judges answers, `asks.py` says what is asked, `sign.py` writes a row.
"""
