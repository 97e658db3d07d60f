"""What people see of a command: text made safe to show, lines, and on a terminal what stands below them.
Start with screen.py.
"""
