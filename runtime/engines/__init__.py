"""Engines: what opens the graphs of a bundle and runs them. One file each."""
