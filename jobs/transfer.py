"""Ray job: train students with different towers on the distilled set SET, a path on Ray's head node.

ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/transfer.py --config CONFIG \\
  SET --to TOWER
"""

from entry import main

if __name__ == "__main__":
    main("transfer", option=True)
