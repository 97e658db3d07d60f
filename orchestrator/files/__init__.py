"""What people write: YAML with positions, strict types, variables, scripts.
Start with process.py and environment.py.
"""
