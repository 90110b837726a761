"""What happens when things break: killed processes, full disks, damaged files, missing packages.

In full, with a seed of its own each time: ``make test-faults``.
"""
