"""The harness (import name `delo_eval`): knows methods only by their interface and writes `results.json`."""
