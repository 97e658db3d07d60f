"""The frozen plan of a deployment, and how it is made of the files. Pure.
Start with plan.py, then make_plan.py.
"""
