"""Coresets: real pairs chosen from the training split, the baselines that a distilled set has to beat.

An *item* is a caption record or an image, and its id is its number in the order of the dataset. Every method returns an
ordered list of distinct ids; equal values go to the smallest id, whatever the chunks, ranks and order of the rows.
"""
