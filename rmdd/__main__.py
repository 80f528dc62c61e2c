"""`python -m rmdd` is the `rmdd` command."""

from rmdd.cli import main

main()
