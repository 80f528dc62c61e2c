"""Coresets: real pairs chosen from the training split, as baselines for a distilled set.

An *item* is a caption record or an image; its id is its position in the dataset. Every selection method returns an
ordered list of distinct ids. Ties go to the smallest id. The result does not depend on the chunk size, the number of
ranks or the order of the rows.
"""
