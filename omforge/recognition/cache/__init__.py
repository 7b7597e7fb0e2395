"""What a model keeps from step to step: growing caches, fixed ones, and recurrent states."""
