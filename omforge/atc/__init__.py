"""The atc command: its flags, its errors, where it is, how it is run, and what it made."""
