"""What measurements share: workloads, programs to start, agents, bounds.
Start with workload.py.
"""
