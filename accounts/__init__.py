"""The User Manager: people, their nodes, and what both may ask of the pipeline. See docs/accounts.md."""
