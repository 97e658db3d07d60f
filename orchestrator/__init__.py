"""The origin: packages enter here, releases are planned, run and remembered.
Start with plan/ and deployment/.
"""
