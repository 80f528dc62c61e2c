"""Ray job: distil the unfinished phases of a run.

ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/distill.py --config CONFIG
"""

from entry import main

if __name__ == "__main__":
    main("distill")
