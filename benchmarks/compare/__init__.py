"""ee-compare: one judge for all early-exit methods, and the tables of docs/comparison.md."""
