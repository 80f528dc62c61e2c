"""What a storage holds, what each part of it is needed for, and what can be removed."""
