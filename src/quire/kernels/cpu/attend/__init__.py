"""The CPU attention kernels, decode and prefill, and their pieces."""
