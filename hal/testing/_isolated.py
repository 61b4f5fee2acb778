"""Checks in a process of their own: a segmentation fault, a hang or a lost device context is one kernel's failure."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from types import TracebackType
from typing import IO, Any

from hal import _plugins
from hal._device import Device
from hal._kernel import Kernel
from hal.errors import HalError
from hal.testing._check import Result, check
from hal.testing._worker import READY, decode, encode
from hal_ops import Request

__all__ = ["Isolated"]

TIMEOUT = 600.0
"""Seconds that one check may take; what a kernel compiles at its first call is within."""
START_TIMEOUT = 300.0


class Isolated:
    """Runs :func:`hal.testing.check` in a worker process, which is started at need and again after a failure.

    Kernels of temporary plugins exist in this process only: they are checked here. So is everything with
    ``enabled=False``.
    """

    def __init__(self, *, enabled: bool = True, timeout: float = TIMEOUT) -> None:
        self.enabled = enabled
        self.timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None

    def __enter__(self) -> Isolated:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def check(self, kernel: Kernel, request: Request, device: Device, seed: int = 0) -> Result:
        """The result, whatever becomes of the process.

        Raises:
            HalError: the process does not even start; the text is what it printed.
        """
        if not self.enabled or _temporary(kernel):
            return check(kernel, request, device=device, seed=seed)
        process = self._started()
        answer = self._answer(process, encode((kernel.name, kernel.phase, request, device.id, seed)), self.timeout)
        if answer is None:
            return Result(kernel.name, kernel.phase, request, "failed", self._last_words(self.timeout))
        result: Result = answer[0]
        if not answer[1]:
            # What a failed kernel did to the device's context must not be held against the next one.
            self._stop()
        return result

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the worker
            self._process = subprocess.Popen(
                [sys.executable, "-m", "hal.testing._worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, env=env,
            )  # fmt: skip
            if self._answer(self._process, b"", START_TIMEOUT) != READY:
                raise HalError(f"the process that checks kernels does not start: {self._last_words(START_TIMEOUT)}")
        return self._process

    @staticmethod
    def _answer(process: subprocess.Popen[bytes], question: bytes, timeout: float) -> Any:
        """The process's next answer, or None if it ends without one; it is killed when it takes too long."""
        assert process.stdin is not None
        assert process.stdout is not None
        watch = threading.Timer(timeout, process.kill)
        watch.start()
        try:
            process.stdin.write(question)
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            watch.cancel()
        return decode(line) if line.endswith(b"\n") else None

    def _last_words(self, timeout: float) -> str:
        """How the worker ended, and the end of what it printed. It is gone afterwards."""
        assert self._process is not None
        assert self._errors is not None
        code = self._process.wait()
        self._errors.seek(0)
        words = self._errors.read().decode(errors="replace").strip()[-1500:]
        self._stop()
        if code == -signal.SIGKILL:
            return f"the process was killed: no answer within {timeout:g} s, or out of memory\n{words}".strip()
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        return f"the process {how}\n{words}".strip()

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._errors is not None:
            self._errors.close()
            self._errors = None


def _temporary(kernel: Kernel) -> bool:
    source = _plugins.registry((kernel.op,)).sources.get(f"kernel:{kernel.name}")
    return source is None or source.plugin in dict(_plugins.temporary())
