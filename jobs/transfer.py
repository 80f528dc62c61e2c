"""Ray job: train students with different towers on a distilled set, whose path must exist on Ray's head node.

ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/transfer.py --config CONFIG \\
  SET --to TOWER
"""

from entry import main

if __name__ == "__main__":
    main("transfer", option=True)
