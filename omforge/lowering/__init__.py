"""From canonical graphs to ATC's dialect: targets, legality, the form of each operator."""
