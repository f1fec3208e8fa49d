"""What overlap_curve.py compares, how its runs share a machine, and what is made of their results."""
