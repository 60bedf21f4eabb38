"""Commands of `delo-eval`, one file each; without one, a stored run is evaluated (`delo_eval.run`)."""
