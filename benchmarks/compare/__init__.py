"""ee-compare: one judge for all early-exit methods on one model and data set, and its tables in
docs/comparison.md.
"""
