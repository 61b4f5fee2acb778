"""What HAL sees on this machine, and two models that run on it, checked: `python -m examples.demo`."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def doctor() -> int:
    """What `hal doctor` says."""
    return subprocess.run([sys.executable, "-m", "hal", "doctor"], check=False).returncode


def search() -> int:
    """MiniLM over ragged batches, against plain torch."""
    from examples.sentence_search.run import main as run

    return run()


def generate() -> int:
    """The tiny Llama from a paged KV cache, against full recomputation."""
    from examples.tiny_llama.run import main as run

    return run()


PARTS: dict[str, tuple[str, Callable[[], int]]] = {
    "doctor": ("What is on this machine: hal doctor", doctor),
    "search": ("Sentence search: MiniLM, ragged attention without padding", search),
    "generation": ("Text generation: continuous batching over a paged KV cache", generate),
}


def run_part(number: int, title: str, part: Callable[[], int]) -> bool:
    """Run one part under its heading; whether its checks passed."""
    heading = f"{number}. {title}"
    print(f"\n{heading}\n{'=' * len(heading)}\n", flush=True)
    start = time.perf_counter()
    passed = part() == 0
    print(f"\n  {'passed' if passed else 'FAILED'} in {time.perf_counter() - start:.1f} s", flush=True)
    return passed


def main() -> int:
    """Run every part, and sum up; 0 if all of them passed."""
    start = time.perf_counter()
    results = {name: run_part(number, *part) for number, (name, part) in enumerate(PARTS.items(), start=1)}
    told = ", ".join(f"{name} {'passed' if passed else 'FAILED'}" for name, passed in results.items())
    print(f"\ndemo: {told}; {time.perf_counter() - start:.0f} s in all")
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    # Run as a file, Python looks for imports beside it and not in the repository.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
