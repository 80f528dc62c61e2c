"""Generative distillation: features, prototypes, decoders, and the studio that a method works in."""
