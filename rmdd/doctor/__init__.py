"""`rmdd doctor`: check whether this machine can run rmdd, and say how to cure what is wrong."""
