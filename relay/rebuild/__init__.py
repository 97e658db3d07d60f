"""The identical nupkg, made again of a package's parts.
Start with rebuilder.py; find_recipe.py finds out how.
"""
