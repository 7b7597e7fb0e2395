"""From an export to a bundle, stage by stage."""
