"""Commands of `delo-eval`, one file each; without one a stored run is evaluated: `harness/run.py`."""
