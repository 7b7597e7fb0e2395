"""The public Python API: what `import omforge` offers, in memory and on disk."""
