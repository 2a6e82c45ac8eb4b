"""The words that CPU kernels are written in: Numba intrinsics over LLVM vectors."""
