"""Studies: many models on one encoder and decoder, scored by one protocol; ``csdiv study NAME``."""
