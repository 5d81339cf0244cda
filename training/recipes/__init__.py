"""One file a published training system; each is a list of stages for the one loop."""
