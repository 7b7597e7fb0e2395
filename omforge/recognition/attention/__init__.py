"""What belongs to one attention: its operands, scores, mask, and what takes its place."""
