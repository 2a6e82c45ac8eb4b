"""Quire: PagedAttention for PyTorch, in Python."""
