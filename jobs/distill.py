"""Ray job: distil all phases of a run that are not finished yet.

ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/distill.py --config CONFIG
"""

from entry import main

if __name__ == "__main__":
    main("distill")
