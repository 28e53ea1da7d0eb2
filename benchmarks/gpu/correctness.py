"""Stages that look at results: the kernels on this device against the torch backend on the same device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from graft.kernels import backends, dispatch, int8
from graft.kernels.formats import Format, by_name

from .setting import RANK, Setting

ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
SUM = 2.0**-23  # of one addition: tensor cores cut off what falls below the accumulator


@dataclass(frozen=True)
class Check:
    """A line of the CSV.

    Attributes:
        different: how many numbers are not the same bits.
        worst: the largest difference, in units in the last place, or as a share of the bound on rounding errors.
        ok: whether that is as it should be.
        note: an error in place of a result.
    """

    what: str
    type: str
    dtype: str
    m: int
    loras: int
    numbers: int
    different: int
    worst: float
    ok: bool
    note: str = ""

    def __str__(self) -> str:
        case = f"{self.type:8} {self.dtype:5} M={self.m:<4} LoRAs={self.loras}"
        verdict = "ok" if self.ok else "WRONG"
        return f"{case} {verdict:6} {self.different:9} of {self.numbers} differ, worst {self.worst:.3g} {self.note}"


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


def _tried(what: str, fmt: Format, dtype: torch.dtype, m: int, loras: int, run: Callable[[], Check]) -> Check:
    """A check whose error is its result: the next type is another kernel."""
    try:
        return run()
    except Exception as error:
        note = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        return Check(what, fmt.name, _name(dtype), m, loras, 0, 0, float("nan"), False, note)


def _ordered(bits: torch.Tensor) -> torch.Tensor:
    """Bits of floats as whole numbers in the floats' order, so that neighbours differ by 1."""
    largest = torch.iinfo(bits.dtype).max
    bits = bits.long()
    return torch.where(bits < 0, -(bits & largest), bits)


def decode(setting: Setting) -> Iterator[Check]:
    """Every type to fp32, fp16 and bf16 from any bytes; compilers for GPUs may contract a product and a sum: 1 ulp."""
    for name in setting.sizes.checked_types:
        fmt = by_name(name)
        n, k = setting.sizes.checked_shape
        generator = torch.Generator().manual_seed(1)
        data = torch.randint(0, 256, (n, fmt.row_bytes(k)), dtype=torch.uint8, generator=generator).to(setting.device)
        for dtype in INTEGERS:

            def run(fmt=fmt, data=data, dtype=dtype, shape=(n, k)) -> Check:
                return _decoded(setting, fmt, data, shape, dtype)

            yield _tried("decode", fmt, dtype, 0, 0, run)


def _decoded(setting: Setting, fmt: Format, data: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Check:
    got = dispatch.dequantize(data, fmt, shape, dtype, backend=setting.backend)
    want = dispatch.dequantize(data, fmt, shape, torch.float32, backend="torch").to(dtype)
    distance = (_ordered(got.view(INTEGERS[dtype])) - _ordered(want.view(INTEGERS[dtype]))).abs()
    distance.masked_fill_(got.isnan() & want.isnan(), 0)
    different, worst = int((distance > 0).sum()), int(distance.max())
    return Check("decode", fmt.name, _name(dtype), 0, 0, distance.numel(), different, worst, worst <= 1)


def encode(setting: Setting) -> Iterator[Check]:
    """Every type to rotated int8 rows, against the torch backend: rounding apart, where two codes are equally near."""
    for name in setting.sizes.checked_types:
        fmt = by_name(name)
        n, k = setting.sizes.checked_shape
        data = setting.weight(fmt, n, k) if fmt.is_quantized else None

        def run(fmt=fmt, data=data, shape=(n, k)) -> Check:
            return _encoded(setting, fmt, data, shape)

        if data is not None:
            yield _tried("encode", fmt, torch.float32, 0, 0, run)


def _encoded(setting: Setting, fmt: Format, data: torch.Tensor, shape: tuple[int, int]) -> Check:
    codes = {}
    for backend in (setting.backend, "torch"):
        scales, _ = int8.prepare(data, fmt, shape, backend)
        codes[backend] = torch.empty(shape, dtype=torch.int8, device=data.device)
        int8.encode(data, fmt, scales, codes[backend], backend)
    distance = (codes[setting.backend].short() - codes["torch"].short()).abs()
    different, worst = int((distance > 0).sum()), int(distance.max())
    ok = worst <= 1 and different <= distance.numel() // 20
    return Check("encode", fmt.name, "int8", 0, 0, distance.numel(), different, worst, ok)


def products(setting: Setting) -> Iterator[Check]:
    """Every type times x in bf16, by the kernel that the plan chooses for M, without and with a LoRA and a bias.

    Against the decoded weight in fp64, with a bound on rounding: the weight's (not in a matvec), each sum's, the
    result's.
    """
    for name in setting.sizes.checked_types:
        fmt = by_name(name)
        n, k = setting.sizes.checked_shape
        data = setting.weight(fmt, n, k)
        weight = dispatch.dequantize(data, fmt, (n, k), torch.float32, backend="torch").double()
        for m in setting.sizes.checked_rows:
            for loras in (0, 1):

                def run(fmt=fmt, data=data, weight=weight, m=m, loras=loras) -> Check:
                    return _product(setting, fmt, data, weight, m, loras)

                yield _tried("product", fmt, torch.bfloat16, m, loras, run)


def _product(setting: Setting, fmt: Format, data: torch.Tensor, weight: torch.Tensor, m: int, loras: int) -> Check:
    n, k = weight.shape
    x, term = setting.random(m, k, seed=3), setting.low_rank(n, k, loras)
    bias = setting.random(n, seed=4) if loras else None
    got = dispatch.linear(x, data, fmt, bias, term, backend=setting.backend).double()
    want, size = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    rounding, of_t = ROUNDING[torch.bfloat16], 0.0
    if term is not None and bias is not None:
        down, scale, up = term.down.double(), term.scale.double(), term.ups[0][2].double()
        t = (x.double() @ down.T) * scale
        want, size = want + t @ up.T + bias.double(), size + t.abs() @ up.abs().T + bias.double().abs()
        # t is rounded twice where torch makes it, as a sum and scaled
        of_t = 2 * rounding * t.abs() + k * SUM * (x.double().abs() @ down.abs().T) * scale.abs()
        of_t = of_t @ up.abs().T
    # the result is rounded once more where the term is added behind the product
    bound = (rounding + (k + RANK + 2) * SUM) * size + 2 * rounding * want.abs() + of_t
    share = (got - want).abs() / bound
    worst = float(share.nan_to_num(float("inf")).max())
    return Check("product", fmt.name, "bf16", m, loras, m * n, int((share > 1).sum()), worst, worst <= 1)


def repeats(setting: Setting) -> Iterator[Check]:
    """The same bits every time: a race between warps would show here."""
    for name in setting.types:
        fmt = by_name(name)
        n, k = setting.sizes.shapes[0]
        data = setting.weight(fmt, n, k)
        for m in setting.sizes.checked_rows:

            def run(fmt=fmt, data=data, m=m) -> Check:
                return _repeated(setting, fmt, data, setting.random(m, data.shape[1] // fmt.type_size * fmt.block_size))

            yield _tried("repeat", fmt, torch.bfloat16, m, 1, run)


def _repeated(setting: Setting, fmt: Format, data: torch.Tensor, x: torch.Tensor) -> Check:
    term = setting.low_rank(len(data), x.shape[1], 1)
    first = dispatch.linear(x, data, fmt, None, term, backend=setting.backend)
    different = 0
    for _ in range(setting.sizes.repetitions):
        again = dispatch.linear(x, data, fmt, None, term, backend=setting.backend)
        different += int((again.view(torch.int16) != first.view(torch.int16)).sum())
    count = setting.sizes.repetitions * first.numel()
    return Check("repeat", fmt.name, "bf16", len(x), 1, count, different, float(different > 0), not different)


def available(setting: Setting) -> Iterator[Check]:
    """Whether the backend takes each type at all, and why not."""
    for name in setting.sizes.checked_types:
        fmt = by_name(name)

        def run(fmt=fmt) -> Check:
            backends.choose(setting.device, fmt, setting.backend)
            return Check("available", fmt.name, "fp32", 0, 0, 0, 0, 0.0, True)

        yield _tried("available", fmt, torch.float32, 0, 0, run)
