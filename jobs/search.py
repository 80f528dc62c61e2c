"""Ray job: hyper-parameter search over `search.space`. If `search.storage` is set, several jobs can share its trials.

ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/search.py --config CONFIG
"""

from entry import main

if __name__ == "__main__":
    main("search")
