"""Generative distillation: features, prototypes, image decoders, captioners and fine-tuning."""
