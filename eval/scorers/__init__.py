"""Scorers of one prediction, one file each; the file's name is the key, `SCORER` the plug-in."""
