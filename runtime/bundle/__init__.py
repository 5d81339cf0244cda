"""A bundle on disk: its manifest, what is checked of it, and its files."""
