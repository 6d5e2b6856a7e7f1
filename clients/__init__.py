"""Libraries for the programs around the pipeline."""
