"""A module per family of published weights: its table of names and its config.json."""
