"""Ray job: train all experts of a run that are not trained yet.

ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/experts.py --config CONFIG
"""

from entry import main

if __name__ == "__main__":
    main("experts")
