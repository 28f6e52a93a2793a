"""Compiles every kernel for sm_90 in the shapes it is launched with; needs no GPU. ``test_triton.py`` runs it.

One line a kernel: name, registers, bytes of stack, bytes of shared memory, threads, programs to a multiprocessor that the
launcher counts on.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pyro_sinkhorn.ot.backends.triton_panel import PANEL, PROGRAMS, panel_kernel, panel_step_kernel
from pyro_sinkhorn.ot.backends.triton_products import NARROW, WIDE, product_kernel
from pyro_sinkhorn.ot.backends.triton_small import small_kernel
from pyro_sinkhorn.ot.backends.triton_tiles import (
    STRETCH,
    TILE,
    columns_kernel,
    half_step_kernel,
    sums_kernel,
    triangle_kernel,
)
from pyro_sinkhorn.ot.backends.triton_update import MEMORY, update_kernel

INTEGERS = {"count_ptr", "done_ptr", "counter_ptr"}
REALS = {"tolerance", "share"}


def measure(kernel, constants, together=1, **options):
    constants = dict(constants)
    for name in ("num_warps", "num_stages"):
        if name in constants:
            options[name] = constants.pop(name)
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*i32" if name in INTEGERS else "*fp32"
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in REALS else "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    (dump,) = Path(triton.__file__).parent.glob("backends/nvidia/bin/cuobjdump*")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [dump, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    threads = 32 * options.get("num_warps", 4)
    name = kernel.fn.__name__
    print("kernel", name, used["REG"], used["STACK"], compiled.metadata.shared, threads, together, flush=True)


def main():
    for precision in ("tf32x3", "tf32"):
        for width in (16, 64, 128):
            scores = {"D": width, "BD": min(width, 64), "DENSE": False, "PRECISION": precision}
            for symmetric in (False, True):
                size = {"BM": 128, "BN": 128, "SYMMETRIC": symmetric}
                measure(small_kernel, {**scores, **size}, num_warps=8)
            for kernel in (half_step_kernel, sums_kernel, triangle_kernel):
                measure(kernel, {**scores, **TILE})
            for columns in (32, 128):
                measure(product_kernel, {**scores, **(NARROW if columns <= 32 else WIDE), "BK": columns})
    for rows, together in ((256, PROGRAMS[512]), (512, PROGRAMS[512]), (1024, PROGRAMS[1024])):
        for symmetric in (False, True):
            size = {"BM": rows, "BN": PANEL, "SYMMETRIC": symmetric, "num_warps": 4 if rows <= 512 else 8}
            measure(panel_kernel, {**size, "ALONE": False}, together, launch_cooperative_grid=True)
        measure(panel_step_kernel, size)
    measure(columns_kernel, {"BLOCK": STRETCH})
    for symmetric in (False, True):
        measure(update_kernel, {"SYMMETRIC": symmetric, "MEMORY": MEMORY, "BLOCK": 2048}, num_warps=8)


if __name__ == "__main__":
    main()
