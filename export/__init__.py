"""From weights to a bundle: split, export, quantize, verify, write; needs the extra export."""
