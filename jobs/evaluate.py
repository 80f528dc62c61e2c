"""Ray job: train students on the distilled set of a run, choose the snapshot on val, and report scores on test.

ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/evaluate.py --config CONFIG
"""

from entry import main

if __name__ == "__main__":
    main("evaluate")
