"""Write the distilled set and its page, as a Ray job: `... -- python jobs/report.py --config demo --set runtime.storage=/mnt/rmdd/runs`."""

from entry import main

if __name__ == "__main__":
    main("report")
