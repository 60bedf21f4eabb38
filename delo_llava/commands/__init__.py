"""Commands of `delo-llava`, one file each; the file's name is the word, `COMMAND` the plug-in."""
