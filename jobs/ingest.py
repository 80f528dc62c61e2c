"""Ray job: read the raw dataset of a run and write it as shards.

ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/ingest.py --config CONFIG
"""

from entry import main

if __name__ == "__main__":
    main("ingest")
