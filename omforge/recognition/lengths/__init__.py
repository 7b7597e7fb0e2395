"""How long a text may be, and what a graph chooses by its length."""
