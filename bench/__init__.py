"""Benchmarks: what they print they measured, side by side in one run, as ratios."""
