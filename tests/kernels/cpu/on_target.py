"""What test_targets.py runs in a process of its own, compiled for another CPU: prints what it found as JSON.

python on_target.py run CASE …          judge the kernels, then say what they are made of
python on_target.py cross TRIPLE CASE … compile for another architecture, and say what that gives

A CASE is a kernel and a Shape, as in "decode-float16-fp8_e4m3-d128-g4"; "amx" is prefill by tile registers.
"""

import itertools
import json
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))


def parse(case):
    from support import Shape

    kernel, dtype, kv_dtype, head_dim, group = case.split("-")
    import torch

    kv_dtype = None if kv_dtype == "same" else kv_dtype
    return kernel, Shape(getattr(torch, dtype), int(head_dim[1:]), int(group[1:]), kv_dtype)


# --- running ---------------------------------------------------------------------------------------------


def judge(kernel, shape, workers):
    """The kernel on a small poisoned batch, against float64; on several workers its long sequence is merged."""
    from accuracy import check
    from support import make_batch

    q_lens = None if kernel == "decode" else [60, 2, 3, 9]
    check(make_batch(shape, [700, 5, 0 if q_lens is None else 4, 33], q_lens), workers=workers)


def judge_store(shape):
    """write_kv against the reference, to the bit."""
    import torch

    from quire.kernels import cpu, reference

    rows = torch.randn(32, 2, shape.head_dim) * torch.logspace(-6, 4, 32)[:, None, None]
    rows = rows.to(shape.dtype)
    results = []
    for kernels in (cpu, reference):
        pages = torch.zeros(2, 2, 4, 8, shape.head_dim, dtype=shape.spec(8).storage_dtype)
        scales = torch.zeros(2, 2, 4, 8)
        scale = (None, None) if shape.kv_dtype is None else scales
        written = rows, -rows, *pages, torch.arange(32), *scale
        kernels.bind_write(*written, False)(*written)
        results.append((pages.view(torch.uint8), scales))
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted), f"{shape}: write_kv differs from the reference"


def run(cases):
    from quire.kernels.cpu.attend.decode import decode
    from quire.kernels.cpu.attend.merge import merge
    from quire.kernels.cpu.attend.prefill import prefill
    from quire.kernels.cpu.store import write

    for number, (kernel, shape) in enumerate(map(parse, cases)):
        if kernel == "store":
            judge_store(shape)
        else:
            judge(kernel, shape, workers=1 if number else 5)
    multiplying, others = (
        [compiled.library.get_asm_str() for kernel in kernels for compiled in kernel.overloads.values()]
        for kernels in ((decode, prefill), (merge, write))
    )
    texts = multiplying + others
    return {
        "kernels": len(texts),
        "registers": sorted({name for text in texts for name in re.findall(r"%([xyz]mm)\d", text)}),
        "fused": sum(len(re.findall(r"\bvfn?m(?:add|sub)\w*ps\b", text)) for text in texts),
        "pair_products": sum(map(pair_products, texts)),
        "spills": [count for text in multiplying for count in spills(text)],
        "called": sorted(set(itertools.chain(*map(outside_calls, texts)))),
    }


# --- compiling only --------------------------------------------------------------------------------------


def outside_calls(text):
    """Functions that the code asks others for, but for Python's and Numba's own."""
    called = set(re.findall(r"^\s+(?:callq?|bl|b)\s+([A-Za-z_]\w*)", text, re.M))
    called |= set(re.findall(r"movabsq\s+\$([A-Za-z_]\w*)", text))
    defined = set(re.findall(r"^(\S+):", text, re.M))
    return {name for name in called - defined if not name.startswith(("Py", "_Py", "_ZN"))}


def cross(triple, cases):
    """The kernels as Numba would compile them on a machine of that kind."""
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    llvm.get_process_triple = lambda: triple
    import numba

    from quire.kernels.cpu.attend import decode, prefill, rows
    from quire.kernels.cpu.attend.config import DTYPE_CODES, Config

    step = rows.Step(*[0] * len(rows.Step._fields))
    call = rows.Call(**dict.fromkeys(rows.Call._fields, 0) | {"softmax_scale": 1.0, "softcap": 0.0})
    found = {}
    for case in cases:
        name, shape = parse(case)
        kernel = decode.decode if name == "decode" else prefill.prefill
        spec = shape.spec(16)
        config = Config(
            DTYPE_CODES[spec.dtype],
            DTYPE_CODES[spec.storage_dtype],
            shape.head_dim,
            shape.group,
            amx=int(name == "amx"),
        )
        signature = tuple(numba.typeof(value) for value in (config, 1, 1, step, call))
        kernel.compile(signature)
        text = kernel.overloads[signature].library.get_asm_str()
        found[case] = {
            "spills": spills(text),
            "instructions": Counter(neon(text)),
            "pair_products": pair_products(text),
            "byte_products": len(re.findall(r"\bvpdpbusd\b", text)),
            "short_products": len(re.findall(r"\bvpmaddwd\b", text)),
            "tiles": tile_instructions(text),
            "saturating": len(re.findall(r"\bvpmaddubsw\b", text)),
            "called": sorted(outside_calls(text)),
        }
    return found


LABEL, JUMP = r"(\.L\w+):", r"(?:j\w+|b(?:\.\w+)?|cbn?z\s+\w+,|tbn?z\s+\w+, #\d+,)\s+(\.L\w+)"
PRODUCT = r"(?:vfmadd\w*ps\b|vdpbf16ps|vpdpbusd|fmla\s)"
SPILL = r"(?:vmov\w+\s+%[xyz]mm\d+, .*\(%rsp\)|st[rp]\s+q.*\[sp)"


def spills(text):
    """How often each innermost loop of at least eight products of vectors stores a vector on the stack."""
    lines = [line.strip() for line in text.splitlines()]
    labels = {found[1]: number for number, line in enumerate(lines) if (found := re.match(LABEL, line))}
    jumps = {(found[1], number) for number, line in enumerate(lines) if (found := re.match(JUMP, line))}
    loops = {(labels[label], end) for label, end in jumps if labels.get(label, end) < end}
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    bodies = [lines[begin : end + 1] for begin, end in inner]
    counts = [[sum(bool(re.match(what, x)) for x in body) for what in (PRODUCT, SPILL)] for body in bodies]
    return [stored for products, stored in counts if products >= 8]


def tile_instructions(text):
    """Each instruction of AMX's, with its operands, in order."""
    names = "ldtilecfg|tilerelease|tilezero|tileloaddt?1?|tilestored|tdpbf16ps"
    return [
        f"{name} {rest.strip()}".strip() for name, rest in re.findall(rf"^\s+({names})\b(.*)$", text, re.M)
    ]


def pair_products(text):
    return len(re.findall(r"\bvdpbf16ps\b", text))


def neon(text):
    """Each AArch64 instruction by its name and the kind of its first register: "fmla.4s", "ldr.q", "ldrh.w"."""
    for name, operand in re.findall(r"^\s+([a-z][a-z0-9]*)\s+(\S+)", text, re.M):
        vector = re.match(r"\{?\s*v\d+\.(\w+)", operand)
        yield f"{name}.{vector[1] if vector else operand[0]}"


if __name__ == "__main__":
    mode, *arguments = sys.argv[1:]
    print(json.dumps(run(arguments) if mode == "run" else cross(*arguments[:1], arguments[1:])))
