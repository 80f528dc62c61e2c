"""Bring the pairs in, as a Ray job: `... -- python jobs/ingest.py --config demo --set runtime.storage=/mnt/rmdd/runs`."""

from entry import main

if __name__ == "__main__":
    main("ingest")
