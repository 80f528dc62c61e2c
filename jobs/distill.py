"""Distil the phases that are not finished, as a Ray job: `... -- python jobs/distill.py --config demo --set runtime.storage=/mnt/rmdd/runs`."""

from entry import main

if __name__ == "__main__":
    main("distill")
