"""Set up the project and run its cluster, with the standard library only.

This runs before anything is installed.
"""
