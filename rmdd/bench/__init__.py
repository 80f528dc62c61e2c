"""Measurements of the matching engine: `rmdd bench`."""
