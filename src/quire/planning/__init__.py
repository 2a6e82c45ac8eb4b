"""A step's lengths and page tables become index lists and equal shares of work, on the host."""
