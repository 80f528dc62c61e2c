"""What is hashed of a run file, and for what."""

NUMBERS_VERSION = 4
"""Part of every hash; raised when a change of the code moves the numbers of an unchanged run file."""
