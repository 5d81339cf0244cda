"""The commands that measure the figures of README and docs, and write their tables."""
