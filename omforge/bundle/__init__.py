"""The bundle: its manifest, its files, and where it comes from and goes to."""
