"""Configurations of our Triton kernels of norms, gates and the rotary embedding, other than those of their tables.

``python benchmarks/tune_ops.py [--json FILE] [--only TEXT]`` on an accelerator; timed as in ``ops.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import triton

sys.path.insert(0, str(Path(__file__).parent))

from op_rows import OpRow, call_of
from timing import Call, Clock

import hal
from hal_ops._triton_gate import GateConfig, GateRows
from hal_ops._triton_norm import NormConfig, NormRows
from hal_ops.rotary_embedding.triton_rotary import RotaryConfig, rotary_embedding
from ops import copy_rate


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
        row = OpRow("rotary_embedding", (8192, 64, 8), {"style": style}, inplace=True)
        request = hal.get_op(row.op, device=device, **row.request_fields()).request
        call = call_of(row, request, device)
        for elements in (1024, 2048, 4096):
            for warps in (1, 2, 4):
                fn = rotary_embedding(request, device, config=RotaryConfig(elements, warps))
                yield f"rotary {style}, {elements} elements, {warps} warps", call.num_bytes, partial(call, fn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="configurations whose name contains this")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    clock = Clock(given.device)
    copy = copy_rate(clock)
    print(f"{clock.name()}: copy {copy / 1e12:.3f} TB/s", flush=True)
    found = []
    for label, size, call in candidates(given.device):
        if given.only in label:
            seconds = clock.cold(call, 40)
            found.append({"label": label, "us": seconds * 1e6, "of copy": size / seconds / copy})
            print(f"{label:60} {seconds * 1e6:9.1f} us  {found[-1]['of copy']:.3f}", flush=True)
    if given.json:
        given.json.write_text(json.dumps({"device": clock.name(), "copy": copy, "tune": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
