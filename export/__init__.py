"""Turn a trained network into a bundle: split, export, quantize, verify, write; needs extra "export"."""
