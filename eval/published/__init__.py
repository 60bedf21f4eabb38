"""Published tables, a YAML file each: numbers with source, protocol and how sure they are."""
