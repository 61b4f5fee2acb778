"""The ops of a decoder layer beside attention, on an accelerator: our Triton kernels, torch's operators, torch.compile.

One run, one table, one JSON. All are measured in turns on the same inputs, with the L2 cache flushed before each call,
and the median is taken. A time is also given as a fraction of the bandwidth at which this device copies, measured in
the same run: bytes that the op must read and write once, over the time, over the bytes per second of a copy. Before it
is timed, each implementation's result is compared with the float32 one.

``python benchmarks/ops.py [--json FILE] [--compile] [--tune TEXT] [--only TEXT]``
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional

from hal_ops import Op, resolve_target
from hal_ops._triton_gate import GateConfig, GateRows
from hal_ops._triton_norm import NormConfig, NormRows
from hal_ops.fp8_quantize import FP8_QUANTIZE
from hal_ops.fp8_quantize.triton_quantize import fp8_quantize
from hal_ops.fused_add_rms_norm import FUSED_ADD_RMS_NORM
from hal_ops.gelu_and_mul import GELU_AND_MUL
from hal_ops.layer_norm import LAYER_NORM
from hal_ops.rms_norm import RMS_NORM
from hal_ops.rotary_embedding import ROTARY_EMBEDDING
from hal_ops.rotary_embedding.tables import rotary_tables
from hal_ops.rotary_embedding.triton_rotary import RotaryConfig, rotary_embedding
from hal_ops.silu_and_mul import SILU_AND_MUL

Call = Callable[[], Any]

MODULES = {
    "rms_norm": "norm",
    "fused_add_rms_norm": "norm",
    "layer_norm": "norm",
    "silu_and_mul": "gate",
    "gelu_and_mul": "gate",
    "rotary_embedding": "rotary",
    "fp8_quantize": "quantize",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One op on one shape. ``shape`` is tokens and hidden size, or tokens, q heads and kv heads of 128."""

    op: Op
    shape: tuple[int, ...]
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    inplace: bool = False

    @property
    def name(self) -> str:
        fields = ", ".join(f"{n} {v}" for n, v in self.fields.items())
        return " ".join(filter(None, [self.op.name, "x".join(map(str, self.shape)), fields, self.inplace * "in place"]))

    def request(self) -> Any:
        if self.op is ROTARY_EMBEDDING:
            heads = {"num_q_heads": self.shape[1], "num_kv_heads": self.shape[2], "head_dim": 128}
            return self.op.request(**heads, **self.fields)
        return self.op.request(hidden_size=self.shape[1], **self.fields)


ROWS = (
    Row(RMS_NORM, (8192, 8192)),
    Row(RMS_NORM, (16384, 4096)),
    Row(RMS_NORM, (8192, 5120)),
    Row(RMS_NORM, (4096, 16384)),
    Row(RMS_NORM, (131072, 128)),
    Row(RMS_NORM, (8192, 8192), {"dtype": "float32"}),
    Row(RMS_NORM, (8192, 8192), inplace=True),
    Row(FUSED_ADD_RMS_NORM, (8192, 8192)),
    Row(FUSED_ADD_RMS_NORM, (16384, 4096)),
    Row(LAYER_NORM, (8192, 8192)),
    Row(SILU_AND_MUL, (8192, 8192)),
    Row(SILU_AND_MUL, (8192, 14336)),
    Row(SILU_AND_MUL, (8192, 11008)),
    Row(GELU_AND_MUL, (8192, 8192), {"approximate": "none"}),
    Row(GELU_AND_MUL, (8192, 8192), {"approximate": "tanh"}),
    Row(ROTARY_EMBEDDING, (8192, 64, 8)),
    Row(ROTARY_EMBEDDING, (8192, 64, 8), inplace=True),
    Row(ROTARY_EMBEDDING, (8192, 64, 8), {"style": "interleaved"}),
    Row(ROTARY_EMBEDDING, (8192, 64, 8), {"rotary_dim": 64}),
    Row(ROTARY_EMBEDDING, (16384, 32, 8), inplace=True),
    Row(FP8_QUANTIZE, (8192, 8192), {"granularity": "token", "fp8_dtype": "float8_e4m3fn"}),
    Row(FP8_QUANTIZE, (8192, 8192), {"granularity": "tensor", "fp8_dtype": "float8_e4m3fn"}),
    Row(FP8_QUANTIZE, (8192, 8192), {"granularity": "tensor", "fp8_dtype": "float8_e4m3fn", "static": True}),
    Row(FP8_QUANTIZE, (8192, 8192), {"granularity": "block", "fp8_dtype": "float8_e4m3fn"}),
    Row(FP8_QUANTIZE, (8192, 8192), {"granularity": "block", "fp8_dtype": "float8_e4m3fn", "block_rows": 128}),
)
SMALL = (
    Row(RMS_NORM, (1, 4096)),
    Row(FUSED_ADD_RMS_NORM, (1, 4096)),
    Row(SILU_AND_MUL, (1, 14336)),
    Row(ROTARY_EMBEDDING, (1, 32, 8), inplace=True),
    Row(FP8_QUANTIZE, (1, 4096), {"granularity": "token", "fp8_dtype": "float8_e4m3fn"}),
)


def inputs_of(row: Row, device: str) -> tuple[Tensor, ...]:
    request, tokens = row.request(), row.shape[0]
    dtype = getattr(torch, request.dtype)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.float32).to(dtype)

    if row.op is ROTARY_EMBEDDING:
        tables = rotary_tables(request.rotary_dim, tokens, device=device)
        heads = (random(tokens, n, 128) for n in row.shape[1:])
        return (*heads, *tables, torch.arange(tokens, device=device))
    hidden = row.shape[1]
    x = random(tokens, hidden * (2 if row.op in (SILU_AND_MUL, GELU_AND_MUL) else 1))
    if row.op is FUSED_ADD_RMS_NORM:
        return x, random(tokens, hidden), random(hidden)
    if row.op is FP8_QUANTIZE:
        return (x, torch.full((1,), 0.01, device=device)) if request.static else (x,)
    return (x, *(random(hidden) for _ in range({"rms_norm": 1, "layer_norm": 2}.get(row.op.name, 0))))


def bytes_of(row: Row, args: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> int:
    """What must be read and written once. Of what passes a partial rotary in place nothing is touched."""
    changed = args[1].nbytes if row.op is FUSED_ADD_RMS_NORM else 0
    used = [*args, *results]
    if row.op is ROTARY_EMBEDDING:
        tables = args[2].nbytes + args[3].nbytes
        used = [*args[:2], args[4], *results]
        return sum(x.nbytes for x in used) + tables
    return changed + sum(x.nbytes for x in used)


def tupled(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def implementations(row: Row, device: str, compiled: bool) -> Iterator[tuple[str, Callable[..., Any]]]:
    module, request = MODULES[row.op.name], row.request()
    for library in ("triton", "torch"):
        yield library, resolve_target(f"hal_ops.{row.op.name}.{library}_{module}:{row.op.name}")(request, device)
    if row.op is FP8_QUANTIZE:
        yield "triton, native", fp8_quantize(request, device, native=True)
    if row.op is RMS_NORM and not row.inplace:
        yield "functional", lambda x, w: functional.rms_norm(x, x.shape[-1:], w, 1e-6)
    if compiled and not row.inplace:
        torch._dynamo.reset()
        plain = resolve_target(f"hal_ops.{row.op.name}.torch_{module}:{row.op.name}")(request, device)
        yield "compiled", torch.compile(plain, fullgraph=True, dynamic=False)


def error_of(row: Row, call: Callable[..., Any], args: tuple[Tensor, ...], device: str) -> float:
    """Relative error against the reference in float32, on the first rows. NaN and the like give a number above 1."""
    request = row.request()
    tokens, flat = row.shape[0], row.op is ROTARY_EMBEDDING
    few = tuple(x[:256].clone() if x.shape[0] == tokens > 1 and (x.dim() > 1 or flat) else x for x in args)
    again = tuple(x.clone() for x in few)
    oracle = resolve_target(row.op.reference["call"])
    if row.op is FP8_QUANTIZE:
        oracle = resolve_target("hal_ops.fp8_quantize.torch_quantize:fp8_quantize")
    right, found = tupled(oracle(request, device)(*again)), tupled(call(*few))
    worst = 0.0
    for a, b in zip(found, right, strict=True):
        difference = (a.double() - b.double()).norm() / b.double().norm()
        worst = max(worst, float(difference) if bool(difference.isfinite()) else 9.0)
    return worst


def times(calls: dict[str, Call], milliseconds: int) -> dict[str, float]:
    """Median microseconds of each call, with a cold L2."""
    return {
        name: 1e3 * triton.testing.do_bench(call, warmup=10, rep=milliseconds, return_mode="median")
        for name, call in calls.items()
    }


def bound(row: Row, fn: Callable[..., Any], args: tuple[Tensor, ...]) -> Call:
    if row.inplace:
        out = args[:2] if row.op is ROTARY_EMBEDDING else args[0]
        return lambda: fn(*args, out=out)
    return lambda: fn(*args)


def copy_bandwidth(device: str) -> dict[str, float]:
    """Bytes per second of copies, read and written bytes together."""
    found = {}
    for name, elements in (("8192x8192 bf16", 8192 * 8192), ("1 GiB", 1 << 29)):
        source = torch.randn(elements, device=device).to(torch.bfloat16)
        target = torch.empty_like(source)
        time_us = times({"copy": lambda a=target, b=source: a.copy_(b)}, 200)["copy"]
        found[name] = 2 * source.nbytes / time_us * 1e6
    return found


def measured(row: Row, device: str, copy: float, compiled: bool) -> dict[str, Any]:
    args = inputs_of(row, device)
    made = dict(implementations(row, device, compiled))
    errors = {name: error_of(row, fn, args, device) for name, fn in made.items() if name != "compiled"}
    size = bytes_of(row, args, tupled(next(iter(made.values()))(*args)))
    found = times({name: bound(row, fn, args) for name, fn in made.items()}, 60)
    fractions = {name: size / us * 1e6 / copy for name, us in found.items()}
    return {"row": row.name, "bytes": size, "us": found, "of copy": fractions, "errors": errors}


def host_time(row: Row, device: str) -> dict[str, float]:
    """Microseconds that the host needs to enqueue one small call."""
    args = inputs_of(row, device)
    found = {}
    for name, fn in implementations(row, device, compiled=False):
        call = bound(row, fn, args)
        for _ in range(20):
            call()
        torch.cuda.synchronize()
        samples = []
        for _ in range(10):
            start = time.perf_counter()
            for _ in range(50):
                call()
            samples.append((time.perf_counter() - start) / 50 * 1e6)
            torch.cuda.synchronize()
        found[name] = statistics.median(samples)
    return found


def tuned(device: str, copy: float, only: str) -> list[dict[str, Any]]:
    """Other configurations than those in the tables."""
    found = []
    for label, size, call in candidates(device):
        if only not in label:
            continue
        us = times({label: call}, 40)[label]
        found.append({"label": label, "us": us, "of copy": size / us * 1e6 / copy})
        print(f"{label:60} {us:9.1f} us  {found[-1]['of copy']:.3f}", flush=True)
    return found


def candidates(device: str) -> Iterator[tuple[str, int, Call]]:
    for tokens, hidden in ((8192, 8192), (16384, 4096), (32768, 2048), (4096, 16384), (8192, 5120), (1 << 19, 128)):
        x, residual, out, affine = (
            torch.randn(n, hidden, device=device).bfloat16() for n in (tokens, tokens, tokens, 1)
        )
        for kind, config in norm_configs(hidden):
            flags = {"add": kind == "fused_add_rms_norm", "center": kind == "layer_norm", "bias": kind == "layer_norm"}
            norm = NormRows(device, hidden, 1e-6, config=config, **flags)
            rest = (affine, residual if kind == "fused_add_rms_norm" else None)
            shape = f"{config.rows} rows" if config.block >= hidden else f"steps of {config.block}"
            size = (4 if kind == "fused_add_rms_norm" else 2) * x.nbytes
            call = lambda f=norm, a=(x, out, affine), r=rest: f(*a, *r)  # noqa: E731
            yield f"{kind} {tokens}x{hidden}, {shape}, {config.warps} warps", size, call
    for hidden in (8192, 14336):
        x = torch.randn(8192, 2 * hidden, device=device).bfloat16()
        out = torch.empty(8192, hidden, device=device, dtype=torch.bfloat16)
        for columns, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16)):
            for activation in ("silu", "gelu"):
                gate = GateRows(device, hidden, activation, config=GateConfig(1 << 30, 1, columns, warps))
                label = f"{activation}_and_mul 8192x{hidden}, {columns} columns, {warps} warps"
                yield label, x.nbytes + out.nbytes, lambda f=gate, a=(x, out): f(*a)
    yield from rotary_candidates(device)


def norm_configs(hidden: int) -> Iterator[tuple[str, NormConfig]]:
    for kind in ("rms_norm", "fused_add_rms_norm", "layer_norm"):
        for block in (1024, 2048, 4096) if hidden > 1024 else ():
            if block < hidden:
                yield from (
                    (kind, NormConfig(hidden, block, 1, warps)) for warps in (4, 8, 16) if block // warps >= 256
                )
        block = triton.next_power_of_2(hidden)
        for rows in (1, 2, 4, 8, 16):
            for warps in (2, 4, 8, 16):
                if 16 <= rows * block // (warps * 32) <= 32 and rows * block <= 16384:
                    yield kind, NormConfig(hidden, block, rows, warps)


def rotary_candidates(device: str) -> Iterator[tuple[str, int, Call]]:
    for style in ("neox", "interleaved"):
        row = Row(ROTARY_EMBEDDING, (8192, 64, 8), {"style": style}, inplace=True)
        args = inputs_of(row, device)
        size = bytes_of(row, args, args[:2])
        for elements in (1024, 2048, 4096):
            for warps in (1, 2, 4):
                fn = rotary_embedding(row.request(), device, config=RotaryConfig(elements, warps))
                yield f"rotary {style}, {elements} elements, {warps} warps", size, bound(row, fn, args)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", default="")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the torch kernels too, a row an op")
    parser.add_argument("--tune", help="other configurations than those in the tables, whose name contains this")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    versions = {"torch": torch.__version__, "triton": triton.__version__, "device": torch.cuda.get_device_name()}
    copies = copy_bandwidth(options.device)
    copy = max(copies.values())
    print(versions, {n: f"{b / 1e12:.2f} TB/s" for n, b in copies.items()}, flush=True)
    rows = []
    for row in ROWS:
        if options.only in row.name:
            first = all(not r["row"].startswith(f"{row.op.name} ") for r in rows)
            rows.append(measured(row, options.device, copy, options.compile and first))
            shown = "  ".join(f"{n} {us:.1f} us {rows[-1]['of copy'][n]:.3f}" for n, us in rows[-1]["us"].items())
            print(f"{row.name:75} {shown}  errors {max(rows[-1]['errors'].values()):.1e}", flush=True)
    host = {row.name: host_time(row, options.device) for row in SMALL if options.only in row.name}
    for name, found in host.items():
        print(f"host {name:60}", {n: round(us, 1) for n, us in found.items()}, flush=True)
    tune = [] if options.tune is None else tuned(options.device, copy, options.tune)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"versions": versions, "copy": copies, "rows": rows, "host": host, "tune": tune}, file, indent=1)
    wrong = [row["row"] for row in rows if max(row["errors"].values()) > 0.05]
    print("WRONG: " + ", ".join(wrong) if wrong else "all results are right", flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
