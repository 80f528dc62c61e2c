"""Train the experts that are missing, as a Ray job: `... -- python jobs/experts.py --config demo --set runtime.storage=/mnt/rmdd/runs`."""

from entry import main

if __name__ == "__main__":
    main("experts")
