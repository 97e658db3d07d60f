"""The relay, and what every house stands on: packages, trust, stores, encodings, the protocol.
Start with errors.py and package/; main.py is the command `waystation`.
"""
