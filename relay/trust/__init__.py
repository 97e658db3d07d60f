"""Which bytes somebody signed, and whose keys count. Pure: values in, values or an error out.
Start with envelopes.py.
"""
