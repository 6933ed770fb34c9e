"""Benchmarks of csdiv beside the formulas and packages people use instead: ``python -m bench --help``."""
