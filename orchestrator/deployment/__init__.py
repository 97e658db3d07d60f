"""One deployment from its set-up to its end.
Start with deployment.py, the story.
"""
