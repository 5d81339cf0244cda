"""Bundles on a model hub: references to them, pulling into a cache, pushing with a model card."""
