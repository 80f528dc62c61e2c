"""Coresets: real pairs chosen from the training split, as baselines for a distilled set.

An *item* to choose is an image or a caption record; its id is its position in the dataset. Every selection method
returns an ordered list of distinct ids. Among items of equal value, the smallest id is chosen first. The result does
not depend on the chunk size, the number of ranks (workers) or the order of the feature rows.
"""
