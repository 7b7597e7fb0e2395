"""What passes are made of: patterns, the matcher, rewrites, pipelines and what watches them."""
