"""Families of published weights: tables of names, and config.json to presets and back."""
