"""Measuring a bundle: calibration, benchmarks, baselines, timing and reports; no walk needs it."""
