"""Train students with other towers on a set, by a path that the head sees.

ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/transfer.py --config CONFIG \\
  SET --to TOWER
"""

from entry import main

if __name__ == "__main__":
    main("transfer", option=True)
