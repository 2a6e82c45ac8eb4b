"""What this machine has, what is missing and how to get it, and whether the kernels are right."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import quire
from quire.assets import DEMO_MODEL
from quire.cli.busy import warning
from quire.cli.console import spinner
from quire.errors import QuireError
from quire.kernels import BACKENDS, load_backend
from quire.spec import AttentionSpec

# package → what it is for, and how to get it
PACKAGES = {
    "torch": ("tensors, the models' arithmetic", "pip install . in Quire's folder"),
    "numba": ("CPU kernels", "pip install . in Quire's folder"),
    "llvmlite": ("CPU kernels", "pip install . in Quire's folder"),
    "numpy": ("planning", "pip install . in Quire's folder"),
    "transformers": ("models", "pip install '.[hf]' in Quire's folder"),
    "tokenizers": ("text", "pip install '.[hf]' in Quire's folder"),
    "safetensors": ("weights", "pip install '.[hf]' in Quire's folder"),
    "triton": ("GPU kernels", "pip install '.[gpu]' in Quire's folder"),
}
SIMD = (("avx512f", "AVX-512", 512), ("avx2", "AVX2", 256), ("neon", "NEON", 128), ("sse2", "SSE2", 128))
EXTENSIONS = ("avx512_bf16", "avx512bf16", "avx512vnni", "avx512_fp16", "avx512fp16", "amx-tile", "avxvnni",
              "fma", "f16c", "sve", "sve2", "bf16", "dotprod")  # fmt: skip
SELF_CHECK_TOLERANCE = 1e-5  # float32 against float64, outputs of order one

GOOD, MISSING, BAD = Text("●", "green"), Text("○", "yellow"), Text("✗", "bold red")


def run() -> int:
    """Print the report; 1 if a self-check failed, else 0."""
    console = Console(highlight=False)
    console.width = max(console.width, 100) if not console.is_terminal else console.width
    console.print(
        f"[bold]Quire {quire.__version__}[/bold] · Python {platform.python_version()} · "
        f"{platform.system()} {platform.machine()}"
    )
    _section(console, "machine", _machine())
    _section(console, "packages", [_package(name) for name in PACKAGES])
    spec = AttentionSpec(4, 2, 64, dtype=torch.float32)
    usable = {name: _why_not(name, spec) for name in BACKENDS}
    _section(console, "backends", [_backend(name, reason) for name, reason in usable.items()])
    _section(console, "files", _files())
    with spinner("checking attention (a first run compiles kernels)"):
        checks = [
            _self_check(name, spec) for name, reason in usable.items() if name != "reference" and not reason
        ]
    _section(console, "self-check", [row for row, _ in checks])
    return 0 if all(good for _, good in checks) else 1


Row = tuple[Text, str, str]


def _section(console: Console, title: str, rows: list[Row]) -> None:
    table = Table.grid(padding=(0, 1))
    table.add_column(width=1)
    table.add_column(no_wrap=True, min_width=14)
    table.add_column()
    for mark, name, what in rows:
        table.add_row(mark, name, Text(what))
    console.print()
    console.print(title, style="bold")
    console.print(table)


def _machine() -> list[Row]:
    rows = [(GOOD, "processor", f"{_cpu_name()}, {_simd()}"), *_tiles(), _load()]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(i)
            rows.append((GOOD, f"GPU {i}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB"))
    else:
        built = torch.version.cuda or getattr(torch.version, "hip", None)
        why = (
            "this PyTorch sees none" if built else f"PyTorch {torch.__version__} is built without GPU support"
        )
        rows.append((MISSING, "GPU", f"none: {why}; fine for CPU use"))
    return rows


def _tiles() -> list[Row]:
    """AMX's tile registers, where the machine has them or someone asks for them."""
    try:
        from quire.kernels.cpu import amx

        if amx.in_use():
            return [(GOOD, "AMX", f"bfloat16 prompts use its tile registers: {amx.VARIABLE}=1")]
        if amx.lacks() is not None:
            return []
        off = (
            f"there, not used: {amx.VARIABLE}=1 lets bfloat16 prompts use it, which no machine has tried yet"
        )
        return [(MISSING, "AMX", off)]
    except QuireError as error:
        return [(BAD, "AMX", str(error))]
    except ImportError:
        return []


def _load() -> Row:
    busy = warning()
    return (MISSING, "load", busy) if busy else (GOOD, "load", "no other program keeps a core busy")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _simd() -> str:
    """The widest vectors LLVM finds here, and extensions that speed kernels up."""
    try:
        import llvmlite.binding as llvm

        features = {name for name, present in llvm.get_host_cpu_features().items() if present}
    except (ImportError, RuntimeError):
        return "SIMD width unknown"
    widest = next(
        (f"{name}: {bits // 32} floats at once" for key, name, bits in SIMD if key in features), "no SIMD"
    )
    extras = [name for name in EXTENSIONS if name in features]
    return " · ".join([widest, *extras])


def _package(name: str) -> Row:
    purpose, how = PACKAGES[name]
    try:
        return GOOD, name, f"{version(name):14} {purpose}"
    except PackageNotFoundError:
        return MISSING, name, f"missing: {purpose}. Fix: {how}"


def _why_not(backend: str, spec: AttentionSpec) -> str | None:
    device = torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")
    try:
        load_backend(backend, spec, device)
    except QuireError as error:
        return str(error)
    return None


def _backend(name: str, reason: str | None) -> Row:
    if reason:
        return MISSING, name, reason
    if name == "reference":
        return GOOD, name, "PyTorch in float64: slow, the specification"
    if name == "cpu":
        from quire.kernels.cpu.threads import HAS_OPENMP, num_threads

        threads = f"{num_threads()} thread{'s' * (num_threads() > 1)}"
        found = "on PyTorch's own OpenMP" if HAS_OPENMP else "as no OpenMP runtime was found beside PyTorch"
        return GOOD, name, f"{threads} {found}"
    return GOOD, name, "on the GPU"


def _files() -> list[Row]:
    weights = DEMO_MODEL / "model.safetensors"
    rows = [
        (GOOD, "demo model", f"{weights.parent}, {weights.stat().st_size / 1e6:.1f} MB")
        if weights.is_file()
        else (BAD, "demo model", f"missing from {weights.parent}. Fix: install quire again")
    ]
    try:
        from quire.kernels.cpu.attend.decode import decode

        cache = Path(decode.stats.cache_path)
        compiled = list(cache.glob("*.nbc"))
    except (ImportError, AttributeError, TypeError):
        return [*rows, (MISSING, "kernel cache", "none: kernels compile anew in every process")]
    size = sum(file.stat().st_size for file in compiled) / 1e6
    return [*rows, (GOOD, "kernel cache", f"{cache}, {len(compiled)} kernels, {size:.1f} MB")]


def _self_check(backend: str, spec: AttentionSpec) -> tuple[Row, bool]:
    """One attention over scattered pages, empty slots filled with NaN, against the float64 reference."""
    error = attention_error(backend, spec)
    good = error <= SELF_CHECK_TOLERANCE
    what = f"largest error against float64: {error:.1e}"
    advice = (
        "" if good else f", more than {SELF_CHECK_TOLERANCE:.0e}: please report this with the lines above"
    )
    return (GOOD if good else BAD, backend, f"paged_attention, {what}{advice}"), good


def attention_error(backend: str, spec: AttentionSpec) -> float:
    """Largest difference between a backend and the reference on three sequences of mixed prefill and decode."""
    device = torch.device("cuda" if backend == "triton" else "cpu")
    random = torch.Generator().manual_seed(0)
    seq_lens, q_lens = [37, 1, 70], [5, 1, 1]
    num_pages = 12
    pages = torch.randperm(num_pages, generator=random).to(torch.int32)
    page_table = torch.full((3, 5), -1, dtype=torch.int32)
    shape = (2, spec.num_kv_heads, num_pages, spec.page_size, spec.head_dim)
    kv = torch.full(shape, float("nan"), dtype=spec.dtype)
    taken = 0
    for row, length in enumerate(seq_lens):
        count = -(-length // spec.page_size)
        page_table[row, :count] = pages[taken : taken + count]
        taken += count
        slots = (page_table[row, :count, None] * spec.page_size + torch.arange(spec.page_size)).flatten()[
            :length
        ]
        values = torch.randn((2, spec.num_kv_heads, length, spec.head_dim), generator=random)
        kv.flatten(2, 3)[:, :, slots.long()] = values.to(spec.dtype)
    q = torch.randn((sum(q_lens), spec.num_qo_heads, spec.head_dim), generator=random).to(spec.dtype)
    starts = torch.tensor([0, *torch.tensor(q_lens).cumsum(0)], dtype=torch.int32)
    step = (page_table, torch.tensor(seq_lens, dtype=torch.int32), starts)
    out = quire.paged_attention(
        q.to(device), kv[0].to(device), kv[1].to(device), *step, backend=backend
    ).cpu()
    exact = quire.paged_attention(q, kv[0], kv[1], *step, backend="reference")
    return float((out.double() - exact.double()).abs().max().nan_to_num(nan=torch.inf))
