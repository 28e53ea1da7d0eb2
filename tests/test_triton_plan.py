"""Which kernel the plan takes, when Triton is refused and why, and that nothing happens before it is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from graft.kernels.formats import BY_NAME, FORMATS
from graft.kernels.triton_ import choose, launch, plan, unavailable, warm

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda", 0)


def card(monkeypatch, architecture: str, multiprocessors: int = 1) -> None:
    """As if CUDA's first device were of this kind."""
    monkeypatch.setattr(plan, "architecture", lambda device: architecture)
    monkeypatch.setattr(plan, "multiprocessors", lambda device: multiprocessors)


@pytest.mark.parametrize(
    ("architecture", "m", "kernel"),
    [
        ("sm_86", 1, "matvec"),
        ("sm_86", 2, "matmul"),
        ("sm_86", 128, "matmul"),
        ("sm_86", 129, "dequantize"),
        ("sm_90", 64, "matmul"),
        ("sm_90", 65, "dequantize"),
        ("sm_75", 1, "matvec"),
        ("sm_75", 2, "dequantize"),
        ("gfx1100", 32, "matmul"),
        ("gfx1030", 2, "dequantize"),
        ("xpu", 2, "dequantize"),
    ],
)
def test_kernel_follows_rows_and_architecture(monkeypatch, architecture, m, kernel):
    card(monkeypatch, architecture)
    assert choose(m, 3072, 3072, BY_NAME["Q4_K"], CUDA, torch.bfloat16) == kernel


@pytest.mark.parametrize(
    ("m", "n", "multiprocessors", "kernel"),
    [
        (16, 3072, 48, "matmul"),
        (16, 3072, 49, "dequantize"),
        (16, 3073, 49, "matmul"),
        (128, 9216, 128, "matmul"),
        (1, 64, 128, "matvec"),
    ],
)
def test_the_fused_kernel_covers_the_card(monkeypatch, m, n, multiprocessors, kernel):
    """A program makes 64 columns of the output, whatever K: with fewer programs than multiprocessors some are idle."""
    card(monkeypatch, "sm_89", multiprocessors)
    assert choose(m, n, 3072, BY_NAME["Q4_K"], CUDA, torch.bfloat16) == kernel


@pytest.mark.parametrize(
    ("name", "k", "dtype"),
    [("BF16", 3072, torch.bfloat16), ("F16", 3072, torch.float16), ("Q8_0", 3072, torch.float32)],
)
def test_what_has_no_fused_kernel_is_decoded(monkeypatch, name, k, dtype):
    """Types that torch multiplies itself; fp32, which tensor cores would round."""
    card(monkeypatch, "sm_89")
    assert choose(16, 3072, k, BY_NAME[name], CUDA, dtype) == "dequantize"


@pytest.mark.parametrize(("unknown", "known"), [("sm_87", "sm_86"), ("sm_100", "sm_90"), ("sm_121", "sm_120")])
def test_unknown_architecture_takes_the_next_older_row(unknown, known):
    assert plan.tiles(unknown) is plan.tiles(known)


@pytest.mark.parametrize("architecture", list(plan.FUSED))
def test_tiles_grow_and_hold_their_rows(architecture):
    rows = plan.tiles(architecture)
    assert [row.m for row in rows] == sorted(row.m for row in rows)
    for m in range(1, rows[-1].m + 1):
        tile = plan.tile(architecture, m)
        assert tile.m >= m and (tile.m == 16 or tile.m < 2 * m)


def test_every_type_has_a_decode_function_and_the_others_say_so():
    decodable = [fmt for fmt in FORMATS if fmt.triton]
    assert len(decodable) == 24
    for fmt in FORMATS:
        reason = unavailable(torch.device("cpu"), fmt)
        if fmt.triton:
            assert callable(launch.dequantize_launch(fmt, max(fmt.block_size, 32)).constants["DECODE"].fn)
            assert reason is None or not launch.interpreted()
        else:
            assert reason == f"there is no kernel for {fmt}"


@pytest.fixture
def compiled(monkeypatch):
    """As if the kernels were compiled; what is known about devices is forgotten before and after."""
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    launch._probe.cache_clear()
    yield monkeypatch
    launch._probe.cache_clear()


def test_devices_that_triton_does_not_compile_for(compiled):
    assert "CPU" in launch.unavailable(torch.device("cpu"))
    assert "mps" in launch.unavailable(torch.device("mps"))


def test_failed_trial_launch_is_a_reason(compiled):
    def fail(*args):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC.")

    compiled.setattr(launch, "dequantize", fail)
    compiled.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    reason = launch.unavailable(torch.device("meta")) or ""
    assert "meta" in reason
    compiled.setattr(launch.torch, "tensor", lambda *a, **k: torch.zeros(34, dtype=torch.uint8))
    compiled.setattr(launch.torch, "empty", lambda *a, **k: torch.zeros(1, 32))
    reason = launch.unavailable(CUDA)
    assert reason == "a trial launch failed with RuntimeError: Please specify via CC."


def test_wrong_trial_result_is_a_reason(compiled):
    compiled.setattr(launch, "dequantize", lambda data, fmt, out: out.zero_())
    compiled.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    compiled.setattr(launch.torch, "tensor", lambda *a, **k: torch.zeros(34, dtype=torch.uint8))
    compiled.setattr(launch.torch, "empty", lambda *a, **k: torch.zeros(1, 32))
    assert "wrong result" in launch.unavailable(CUDA)


def test_old_triton_is_refused_on_blackwell_before_it_aborts(compiled):
    compiled.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    compiled.setattr(launch.triton, "__version__", "3.2.0")
    assert launch.unavailable(CUDA) == "Triton 3.2.0 does not know sm_120: update it to 3.3 or later"


def test_warm_compiles_each_type_once(compiled):
    seen = []
    compiled.setattr(launch.Launch, "compile", lambda self, *args: seen.append(self.constants.get("DECODE")))
    lines: list[str] = []
    fmts = [BY_NAME[name] for name in ("Q4_K", "F32", "Q4_K", "BF16", "IQ4_XS")]
    warm(fmts, torch.device("cpu"), torch.bfloat16, lines.append)
    assert lines == ["compiling kernels for Q4_K", "compiling kernels for IQ4_XS"]
    assert len(set(map(id, seen)) - {id(None)}) == 2


def test_a_type_that_does_not_compile_goes_another_way(compiled, caplog):
    decode = launch.dequantize_launch(BY_NAME["Q6_K"], 256).constants["DECODE"]

    def compile_(self, *args: object) -> None:
        if self.constants.get("DECODE") is decode:
            raise RuntimeError("ptxas went away")

    compiled.setattr(launch.Launch, "compile", compile_)
    compiled.setattr(launch, "_failed", {})
    device = torch.device("cpu")
    warm([BY_NAME["Q6_K"], BY_NAME["Q4_K"]], device, torch.bfloat16)
    reason = launch.unavailable(device, BY_NAME["Q6_K"])
    assert reason == "its kernels for Q6_K do not compile: RuntimeError: ptxas went away" and reason in caplog.text
    assert launch.unavailable(device, BY_NAME["Q4_K"]) != reason


# a driver without a device: enough to compile and to look kernels up, not to launch them
WITHOUT_DEVICE = """
import os, sys, types
os.environ.pop("TRITON_INTERPRET", None)
sys.modules["graft"] = types.ModuleType("graft")
sys.modules["graft"].__path__ = [sys.argv[1]]
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:
    launcher_cls = None
    def get_current_target(self): return GPUTarget("cuda", 86, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

driver.set_active(Driver())
from graft.kernels import triton_
from graft.kernels.formats import BY_NAME
from graft.kernels.triton_ import launch, plan

plan.architecture = lambda device: "sm_86"
KERNELS = (
    launch.dequant.dequantize_kernel, launch.matvec_kernel, launch.matmul_kernel, launch.projection.project_kernel
)

def compiled():
    return [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in KERNELS]

fmt, device, dtype = BY_NAME["Q8_0"], torch.device("cpu"), torch.bfloat16
triton_.warm([fmt], device, dtype)
before = compiled()
assert before == [1, 4, 4, 1], before

def empty(*shape): return torch.empty(*shape, dtype=dtype)

for n, k in ((13, 3072), (3072, 256)):
    data = torch.empty(n, fmt.row_bytes(k), dtype=torch.uint8)
    calls = [(triton_.dequantize, data, fmt, empty(n, k))]
    for kernel, m in ((triton_.matvec, 1), (triton_.matmul, 2), (triton_.matmul, 16)):
        for low in (None, (empty(m, 48), empty(n, 48))):
            calls += [(kernel, empty(m, k), data, fmt, empty(m, n), bias, low) for bias in (None, torch.empty(n))]
    for scale in (torch.empty(48), torch.empty(2, 48)):
        m = len(scale) if scale.dim() == 2 else 1
        calls.append((triton_.project, empty(m, k), empty(48, k), scale, empty(m, 48)))
    for call, *args in calls:
        try:
            call(*args)
        except Exception as error:
            assert "NoneType" in str(error), error  # what stands for the launcher
        else:
            raise AssertionError("launched without a device")
assert compiled() == before, compiled()
"""


def test_warm_compiles_what_launches_ask_for():
    """Not one specialization more: neither sizes nor ranks make another."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_DEVICE, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# kernels that are found again without Triton: what is counted is how often it looks one up itself
KEPT = """
import os, sys
os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, sys.argv[1])
import checkout, torch
from gpu.standin import Launcher, stand_in
from graft.kernels.formats import by_name
from graft.kernels.triton_ import launch, matvec
from triton.runtime.jit import JITFunction

stand_in("sm_86")
looked_up, launched = [], []
run = JITFunction.run
JITFunction.run = lambda self, *args, **more: looked_up.append(self) or run(self, *args, **more)
Launcher.__call__ = lambda self, *args: launched.append(args[:3] + args[9:])
fmt, n, k = by_name("Q8_0"), 8, 256
data, out = torch.zeros(n, fmt.row_bytes(k), dtype=torch.uint8), torch.empty(1, n, dtype=torch.bfloat16)
x, bias = torch.zeros(1, k, dtype=torch.bfloat16), torch.zeros(n, dtype=torch.bfloat16)
term = torch.zeros(1, 16, dtype=torch.bfloat16), torch.zeros(n, 16, dtype=torch.bfloat16)
beside = torch.zeros(k + 1, dtype=torch.bfloat16)[1:].view(1, k)  # not where 16 bytes begin
for case in ((x, None, None), (x, bias, None), (x, bias, term), (x.half(), bias, None)):
    for turn in range(2):
        matvec(case[0], data, fmt, out, *case[1:])
    first, again = launched[-2:]
    assert len(first) == len(again) and all(a is b or a == b for a, b in zip(first, again)), (first, again)
assert len(looked_up) == 4 and len(launched) == 8, (len(looked_up), len(launched))
for turn in range(2):
    matvec(beside, data, fmt, out)
assert len(looked_up) == 6 and len(launched) == 10
for launcher in (launch.dequantize_launch(fmt, 64), launch.matvec_launch(fmt, 256), launch.int8_launch(fmt)):
    constants = list(launcher.constants)
    assert launcher.kernel.arg_names[-len(constants):] == constants
"""


def test_a_call_asks_little_of_torch():
    """With one row of x: memory for the result, and for the ranks; four views and products for each part of a layer."""
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_host.py"), "--answer"]
    cases = "no LoRA\na LoRA\na LoRA for each of three parts\n"
    done = subprocess.run(command, input=cases, capture_output=True, text=True)
    assert [int(line.split()[0]) for line in done.stdout.splitlines()] == [1, 2, 2 + 3 * 4], done.stderr


@pytest.mark.parametrize("again", ["right", "wrong", "an error"])
def test_what_is_kept_is_tried_first(again, monkeypatch):
    def decode(data, fmt, out):
        tries.append(fmt.name)
        if len(tries) == 2 and again == "an error":
            raise TypeError("function takes 20 arguments (24 given)")
        out.copy_(torch.zeros(32) if len(tries) == 2 and again == "wrong" else torch.arange(32.0))

    tries: list[str] = []
    monkeypatch.setattr(launch, "dequantize", decode)
    monkeypatch.setattr(launch, "_keeps", True)
    assert launch._probe.__wrapped__(torch.device("cpu")) is None
    assert tries == ["Q8_0", "Q8_0"] and launch._keeps == (again == "right")


def test_a_kernel_is_found_again_with_the_same_arguments():
    code = [sys.executable, "-c", KEPT, str(ROOT / "benchmarks")]
    done = subprocess.run(code, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_triton_is_imported_on_first_use_only():
    code = (
        "import sys, types; package = types.ModuleType('graft'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['graft'] = package\n"
        "import torch; before = set(sys.modules)\n"
        "import graft.kernels.dispatch\n"
        "new = set(sys.modules) - before\n"
        "assert not any(name.split('.')[0] == 'triton' or 'triton_' in name for name in new), new\n"
    )
    subprocess.run([sys.executable, "-c", code, str(ROOT)], check=True)
