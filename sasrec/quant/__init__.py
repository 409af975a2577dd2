"""Quantization: what a grid is, where quantizers go, and one file per method that says how scales are found."""
