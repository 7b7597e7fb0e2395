"""Running a bundle: sessions, the KV cache, generation and comparison."""
