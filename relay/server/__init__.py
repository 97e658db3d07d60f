"""The relay's service: routes by subject, and http/ between them and the network.
Start with app.py, which composes them.
"""
