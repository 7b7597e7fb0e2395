"""What recognises a model: its interface, and what each of its parts means."""
