"""What people write: YAML with positions, strict types, every mistake at once with its line.
Start with yaml_positions.py, then decode.py.
"""
