"""Run the `rmdd` command line as `python -m rmdd`."""

from rmdd.cli.app import main

if __name__ == "__main__":
    main()
