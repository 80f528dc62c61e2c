"""Ray job: search over `search.space`. With `search.storage` set, several submitted jobs share the trials.

ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/search.py --config CONFIG
"""

from entry import main

if __name__ == "__main__":
    main("search")
