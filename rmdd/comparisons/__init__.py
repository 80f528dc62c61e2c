"""Comparisons of sets under one protocol, transfer of a set to other towers, coresets, and published results."""
