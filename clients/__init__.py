"""What other programs import: clients of the pipeline that know nothing of its inside."""
