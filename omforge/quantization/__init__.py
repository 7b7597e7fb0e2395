"""What quantising is made of: schemes, arithmetic, and tensors that are computed in pieces."""
