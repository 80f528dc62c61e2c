"""`python -m rmdd` is the `rmdd` command."""

from rmdd.cli.app import main

if __name__ == "__main__":
    main()
