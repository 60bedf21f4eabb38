"""Task sequences: one YAML file each, found by its name."""
