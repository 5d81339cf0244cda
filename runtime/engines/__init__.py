"""Engines, which open the graphs of a bundle and run them; one file each."""
