"""All steps; what is there already is used, as a Ray job: `... -- python jobs/run.py --config demo --set runtime.storage=/mnt/rmdd/runs`."""

from entry import main

if __name__ == "__main__":
    main("run")
