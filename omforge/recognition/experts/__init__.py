"""Mixtures of experts: what works row by row, and rows sorted by expert."""
