"""From a recipe to records, presence masks and batches."""
