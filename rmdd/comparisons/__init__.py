"""Comparisons of sets under one protocol, transfer of a set to different towers, coresets, and published results."""
