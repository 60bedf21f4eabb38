"""What must be known of a model family: one file each, named after the `model_type` of its config.json."""
