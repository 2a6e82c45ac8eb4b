"""The public operators: check → plan → dispatch."""
