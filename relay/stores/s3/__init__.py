"""A store in a bucket: `bucket.py` asks S3, `settings.py` says which and how; `keys.py` has the layout.
Start with `open_bucket.py`; `chunks.py`, `documents.py` and `blobs.py` are the store's three faces.
"""
