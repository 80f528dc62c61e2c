"""Ray job: train the missing experts of a run.

ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/experts.py --config CONFIG
"""

from entry import main

if __name__ == "__main__":
    main("experts")
