"""Evaluate sets and subsets, by paths that the head sees, under the protocol of CONFIG.

ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/compare.py --config CONFIG \\
  A B random
"""

from entry import main

if __name__ == "__main__":
    main("compare", option=True)
