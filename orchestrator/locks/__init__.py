"""Who works where: one deployment of a project at a time, one turn of a machine, and which of them are alive.
Start with locks.py.
"""
