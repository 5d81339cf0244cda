"""A bundle on disk: its manifest, the checks of the manifest, and its files."""
