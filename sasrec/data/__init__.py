"""Data sets: where they come from, how each format is read, what is kept of them, and the store that training reads."""
