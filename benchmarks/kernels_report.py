"""What the Triton kernels cost, found without a GPU: compile them for every target and read the machine code.

    python benchmarks/kernels_report.py                          # every type, kernel and target
    python benchmarks/kernels_report.py --formats Q4_K --targets sm_86

The compiler for AMD and ptxas, cuobjdump for NVIDIA come with the triton package. Instructions per weight are those
that the lanes of a program execute for a weight: all of them in dequantize and int8, those of the loop over the
weights in matvec and matmul.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120", "gfx942", "gfx1100")
KERNELS = ("dequantize", "matvec", "matmul", "int8", "int8_largest")
DTYPES = ("bf16", "fp16", "fp32")
# what a kernel writes, whatever the dtype of x
_OUT = {"int8": "i8", "int8_largest": "fp32"}


@dataclass(frozen=True)
class Case:
    """One kernel to compile.

    Attributes:
        m: rows of x, which decide on matmul's tile.
        low_rank: with the low-rank term and a bias.
        count: also disassemble, to count instructions on NVIDIA.
    """

    kernel: str
    fmt: str
    target: str
    dtype: str = "bf16"
    m: int = 16
    low_rank: bool = False
    count: bool = True


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes.

    Attributes:
        registers: a thread's.
        spilled: bytes of stack or scratch memory a thread uses because registers ran out.
        shared: bytes of shared memory a program uses.
        instructions: lane instructions per weight; None where they are not counted.
        loads: those of them that load from global memory; likewise.
        wide_stores: whether all writes to global memory are of 16 bytes.
        tensor_cores: whether a matrix instruction is used.
        wide_rows: whether the offsets of rows in the packed bytes are 64-bit.
    """

    case: Case
    registers: int
    spilled: int
    shared: int
    instructions: float | None
    loads: float | None
    wide_stores: bool
    tensor_cores: bool
    wide_rows: bool


def _bind() -> None:
    """Make the checkout importable as `graft`, whatever its folder is called."""
    if "graft" not in sys.modules:
        package = types.ModuleType("graft")
        package.__path__ = [str(ROOT)]
        sys.modules["graft"] = package


def _launch(case: Case):
    """The launch, and how many weights a program, or one turn of its loop, takes."""
    from graft.kernels.formats import by_name
    from graft.kernels.triton_ import launch, plan

    fmt = by_name(case.fmt)
    if case.kernel == "project":  # which reads no packed weights
        found = launch.project_launch()
        return found, found.constants["UNIT"]
    if case.kernel == "dequantize":
        found = launch.dequantize_launch(fmt, launch.block_of(fmt, 4096))
        return found, found.constants["BLOCKS"] * found.constants["QK"]
    if case.kernel.startswith("int8"):
        found = launch.int8_launch(fmt) if case.kernel == "int8" else launch.int8_largest_launch(fmt)
        return found, found.constants["BLOCKS"] * 256
    if case.kernel == "matvec":
        found = launch.matvec_launch(fmt, launch.UNIT)
        return found, found.constants["ROWS"] * found.constants["UNIT"]
    found = launch.matmul_launch(fmt, plan.tile(case.target, case.m))
    return found, found.constants["BLOCK_N"] * found.constants["UNIT"]


def _compile(case: Case):
    """Compile as a launch would: pointers but `data` aligned to 16 bytes, K a multiple of 16."""
    import triton
    from graft.kernels.formats import by_name
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch, weights = _launch(case)
    absent = {"table"} if by_name(case.fmt).book is None else set()
    if not case.low_rank and case.kernel != "project":
        absent |= {"bias", "t", "up"}
    kernel = launch.kernel
    constants = launch.constants | {name: None for name in kernel.arg_names if name in absent}
    pointers = {"data": "*u8", "table": "*i32", "scales": "*fp32", "scale": "*fp32"}
    pointers |= dict.fromkeys(("x", "out", "bias", "down", "t", "up"), f"*{_OUT.get(case.kernel, case.dtype)}")
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    aligned = [name not in constants and (name == "k" or (name in pointers and name != "data")) for name in signature]
    attributes = {(i,): [["tt.divisibility", 16]] for i, yes in enumerate(aligned) if yes}
    if case.target.startswith("sm_"):
        target = GPUTarget("cuda", int(case.target[3:]), 32)
    else:
        target = GPUTarget("hip", case.target, 64 if case.target.startswith("gfx9") else 32)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=launch.options), launch.warps * target.warp_size, weights


def _cuobjdump(option: str, cubin: bytes) -> str:
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def _instructions(sass: str) -> list[tuple[int, str, str]]:
    """Address, opcode and operands of every instruction, without the padding behind the last."""
    pattern = re.compile(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);", re.MULTILINE)
    code = [(int(match[1], 16), match[2], match[3]) for match in pattern.finditer(sass)]
    # a branch to itself follows the last instruction
    ends = (i for i, (at, name, where) in enumerate(code) if name == "BRA" and where.split()[-1] == hex(at))
    return code[: next(ends, len(code))]


def _loop(code: list[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    """The longest innermost loop: what lies between a branch backwards and its target."""
    jumps = [(int(where.split()[-1], 16), at) for at, name, where in code if name.startswith("BRA") and "0x" in where]
    loops = [(start, end) for start, end in jumps if start < end]
    innermost = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    start, end = max(innermost, key=lambda loop: loop[1] - loop[0])
    return [line for line in code if start <= line[0] <= end]


def _is_load(name: str) -> bool:
    """Whether an instruction loads from global memory, into registers or, asynchronously, into shared memory."""
    return name.startswith(("LDG.", "LDGSTS."))


def _wide_rows(ttir: str) -> bool:
    """Whether the first offset added to `data`, the program's own, is a 64-bit number."""
    return re.search(r"tt\.addptr %data\w*, %\w+ .*: !tt\.ptr<i8>, i64", ttir) is not None


def _read_nvidia(asm) -> dict[str, Any]:
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _cuobjdump("-res-usage", asm["cubin"])))
    return {
        "registers": int(usage["REG"]),
        "spilled": int(usage["STACK"]) + int(usage["LOCAL"]),
        "wide_stores": set(re.findall(r"\bst\.global\.(\S+)", asm["ptx"])) == {"v4.b32"},
        "tensor_cores": re.search(r"\b(mma|wgmma|tcgen05)\.", asm["ptx"]) is not None,
    }


def _read_amd(asm) -> dict[str, Any]:
    text = asm["amdgcn"]
    usage = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size|[sv]gpr_spill_count):\s+(\d+)", text))
    return {
        "registers": int(usage["vgpr_count"]),
        "spilled": int(usage["private_segment_fixed_size"]) + 4 * int(usage["vgpr_spill_count"]),
        "wide_stores": set(re.findall(r"\b(?:global|buffer)_store_(\w+)", text)) <= {"dwordx4", "b128"},
        "tensor_cores": re.search(r"\bv_(mfma|wmma)", text) is not None,
    }


def measure(case: Case) -> Usage:
    """Compile one kernel and read what it takes."""
    kernel, threads, weights = _compile(case)
    read = _read_amd if case.target.startswith("gfx") else _read_nvidia
    taken = read(kernel.asm)
    taken["shared"] = kernel.metadata.shared
    taken["wide_rows"] = _wide_rows(kernel.asm["ttir"])
    counted = loads = None
    if case.count and "cubin" in kernel.asm:
        code = _instructions(_cuobjdump("-sass", kernel.asm["cubin"]))
        code = _loop(code) if case.kernel in ("matvec", "matmul") else code
        counted = round(len(code) * threads / weights, 2)
        loads = round(sum(_is_load(name) for _, name, _ in code) * threads / weights, 3)
    return Usage(case, instructions=counted, loads=loads, **taken)


def _prepare() -> None:
    # read when Triton is imported: the interpreter compiles nothing
    os.environ.pop("TRITON_INTERPRET", None)
    _bind()


def survey(cases: Iterable[Case], processes: int = os.cpu_count() or 1) -> list[Usage]:
    """`measure` for many, in their order. Triton must not have been imported with its interpreter in this process."""
    with multiprocessing.get_context("spawn").Pool(processes, _prepare) as pool:
        return pool.map(measure, cases, chunksize=4)


def _decodable() -> list[str]:
    from graft.kernels.formats import FORMATS

    return [fmt.name for fmt in FORMATS if fmt.triton]


def _table(rows: list[Usage]) -> str:
    lines = ["type     kernel     target      M  regs spilled  shared instr/weight loads/weight"]
    for row in rows:
        case = row.case
        m = case.m if case.kernel == "matmul" else 1 if case.kernel == "matvec" else ""
        counted = "" if row.instructions is None else f"{row.instructions:>12.1f} {row.loads:>12.2f}"
        lines.append(
            f"{case.fmt:8} {case.kernel:10} {case.target:8} {m:>4} {row.registers:>5} "
            f"{row.spilled:>7} {row.shared:>7} {counted}".rstrip()
        )
    return "\n".join(lines)


def main() -> None:
    _prepare()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=_decodable())
    parser.add_argument("--kernels", nargs="+", default=KERNELS, choices=KERNELS)
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--m", type=int, default=16, help="rows of x for matmul")
    parser.add_argument("--low-rank", action="store_true", help="with a low-rank term and a bias")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--cases", help="a JSON list of cases instead, '-' for standard input; prints JSON")
    args = parser.parse_args()
    if args.cases:
        text = sys.stdin.read() if args.cases == "-" else Path(args.cases).read_text()
        print(json.dumps([asdict(row) for row in survey((Case(**case) for case in json.loads(text)), args.processes)]))
        return
    print(_table(survey(
        [
            Case(kernel, fmt, target, args.dtype, args.m, args.low_rank)
            for fmt in args.formats for kernel in args.kernels for target in args.targets
        ],
        args.processes,
    )))  # fmt: skip


if __name__ == "__main__":
    main()
