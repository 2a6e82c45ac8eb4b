"""The GPU benchmark: every kernel against the reference, then time, ceilings and peers, in one call."""
