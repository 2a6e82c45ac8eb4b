"""The CPU backend: paged attention in Numba, written in the words of ``simd``.

backend.py   what ``kernels`` asks of a backend
threads.py   kernels on torch's own threads; ``kernels.compile`` compiles them
wake.py      when that pays
attend/      decode, prefill, merge
simd/        the vector operations ("words") they are written in
store.py     keys and values into their slots
linear.py    linear layers of a few tokens
"""

from quire.kernels.cpu.backend import bind, bind_write, compile_jobs, prepare, tiling, why_not

__all__ = ["bind", "bind_write", "compile_jobs", "prepare", "tiling", "why_not"]
