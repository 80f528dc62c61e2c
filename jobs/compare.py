"""Ray job: evaluate distilled sets and coresets with the settings in CONFIG. Paths must exist on Ray's head node.

ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/compare.py --config CONFIG \\
  A B random
"""

from entry import main

if __name__ == "__main__":
    main("compare", option=True)
