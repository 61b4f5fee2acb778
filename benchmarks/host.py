"""What one planned decode call costs the host: over Triton's own launch of the same kernel with the same arguments."""

from __future__ import annotations

from typing import Any

from grid import CASES, Inputs
from timing import Clock

import hal

__all__ = ["targets"]


def targets(clock: Clock) -> dict[str, float]:
    """Seconds of the host, and ``ratio``: the kernel's planned call over the bare launch. Of case D7, one row.

    ``handle`` is the public call, with its checks; ``plan`` the plan of a step.
    """
    from hal_ops.attention._triton_decode_kernels import decode_kernel

    case = next(case for case in CASES if case.id == "D7")
    inputs = Inputs.of(case, clock.device)
    handle = hal.get_attentions([case.request()], device=clock.device, kernel="triton")[0]
    (q_len, kv_len), (q, k, v) = case.lengths[0], inputs.sets[0]
    plan = handle.plan(q_lens=[q_len], kv_lens=[kv_len], block_table=inputs.table)
    impl: Any = handle.implementation("decode")
    cache = hal.KVCache(k, v, layout="NHD")
    step, payload = plan._step, plan._payload

    launches: list[tuple[Any, ...]] = []
    launch = impl._launch
    impl._launch = lambda *arguments: launches.append(arguments)
    impl(q, k, v, step, payload)
    impl._launch = launch
    programs, key, *arguments = launches[0]
    constants, options = launch.constants(key), launch._options
    found = {}
    for _ in range(2):
        found["planned call"] = clock.enqueue(lambda: impl(q, k, v, step, payload))
        found["triton launch"] = clock.enqueue(lambda: decode_kernel[(programs,)](*arguments, **constants, **options))
    found["handle"] = clock.enqueue(lambda: handle(q, cache=cache, plan=plan))
    found["plan"] = clock.enqueue(lambda: impl.plan(step))
    found["ratio"] = found["planned call"] / found["triton launch"]
    return {name: value * (1 if name == "ratio" else 1e6) for name, value in found.items()}
