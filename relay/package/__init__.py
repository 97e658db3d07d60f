"""What a package is. Pure: names, the walk over its zip, parts, chunks, manifests, recipes.
Start with identity.py and chunk.py, then manifest.py.
"""
