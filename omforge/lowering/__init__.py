"""Lowering: targets, legality, the ATC dialect, the atc command and the bundle."""
