"""Ray job: write the distilled set and the HTML report of a run.

ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/report.py --config CONFIG
"""

from entry import main

if __name__ == "__main__":
    main("report")
