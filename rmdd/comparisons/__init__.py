"""Many sets under one protocol, one set under many towers, and what others have published."""
