"""Passes: one file each, and what passes are made of."""
