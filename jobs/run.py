"""Ray job: run all steps of a run; steps that are finished already are not repeated.

ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/run.py --config CONFIG
"""

from entry import main

if __name__ == "__main__":
    main("run")
