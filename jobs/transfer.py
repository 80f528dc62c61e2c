"""Ray job: train students with other towers on a set. The path of the set must exist on the head node.

ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/transfer.py --config CONFIG \\
  SET --to TOWER
"""

from entry import main

if __name__ == "__main__":
    main("transfer", option=True)
