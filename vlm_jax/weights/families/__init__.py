"""A module per family of transformers: `read` and `write` its config.json, `rows` of its names."""
