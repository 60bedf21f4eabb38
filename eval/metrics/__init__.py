"""Metrics over the accuracy matrix, one file each; the file's name is the key, `METRIC` the plug-in."""
