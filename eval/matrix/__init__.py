"""The accuracy matrix, the metrics over it, its file `results.json`, and how both are shown."""
