"""Train students, choose on val, read test once, as a Ray job: `... -- python jobs/evaluate.py --config demo --set runtime.storage=/mnt/rmdd/runs`."""

from entry import main

if __name__ == "__main__":
    main("evaluate")
