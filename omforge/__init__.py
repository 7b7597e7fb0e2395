"""omforge rewrites exported LLM graphs into what Ascend's ATC compiler accepts, and proves it."""

__version__ = "0.1.0"
