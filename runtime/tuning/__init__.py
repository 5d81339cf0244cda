"""Measuring a bundle: calibration, benchmarks, baselines, timing and reports; walks do not need it."""
