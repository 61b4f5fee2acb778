"""A process that checks kernels, one after another: run as ``python -m hal.testing._worker``.

It says that it is ready, then reads a task a line and answers a line, both pickled in base64: the result, and whether
the device still works. What else is printed goes to stderr. It is started anew after a crash, so that a kernel that
takes the process or the device with it fails alone.
"""

from __future__ import annotations

import base64
import os
import pickle
import sys
from typing import Any, BinaryIO

__all__ = ["READY", "decode", "encode"]

READY = "ready"


def encode(value: Any) -> bytes:
    """One line."""
    return base64.b64encode(pickle.dumps(value)) + b"\n"


def decode(line: bytes) -> Any:
    """What :func:`encode` made the line of. Both ends are this library's own processes."""
    return pickle.loads(base64.b64decode(line))


def serve(tasks: BinaryIO, answers: BinaryIO) -> None:
    """Answer until the tasks end."""
    from hal import _plugins
    from hal.testing._check import Result, check

    _plugins.registry()
    _say(answers, READY)
    for line in tasks:
        kernel, phase, request, device, seed = decode(line)
        try:
            result = check(kernel, request, device=device, seed=seed)
        except Exception as error:  # noqa: BLE001 - what check() raises speaks about the task, not about the kernel
            result = Result(kernel, phase, request, "untested", f"{type(error).__name__}: {error}")
        _say(answers, (result, result.ok or _works(device)))


def _say(answers: BinaryIO, value: Any) -> None:
    answers.write(encode(value))
    answers.flush()


def _works(device: str) -> bool:
    """Whether the device still computes: some errors spoil its context for the rest of the process."""
    import torch

    from hal._devices import device as find

    try:
        return int(torch.ones(8, device=find(device).torch_device()).sum().item()) == 8
    except Exception as error:  # noqa: BLE001 - the answer is no, whatever the device's runtime raises
        sys.stderr.write(f"{device} works no longer: {error}\n")
        return False


if __name__ == "__main__":
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, channel)
