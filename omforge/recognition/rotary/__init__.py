"""Rotary embeddings: their angles, their pairs, the heads that they rotate, their tables."""
