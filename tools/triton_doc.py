"""Make ``docs/triton-resources.md`` of ``docs/_data/triton_aot.json``: what compilers say of the Triton kernels.

The table itself is written by ``tests/triton/aot.py``. ``--check`` writes nothing, and exits with 1 if the page is stale.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["render"]

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/triton-resources.md"
TABLE = ROOT / "docs/_data/triton_aot.json"

Row = Mapping[str, Any]

_HEAD = """\
<!-- Made by tools/triton_doc.py from docs/_data/triton_aot.json, which tests/triton/aot.py writes. -->

# Triton resources

The portable Triton kernels are compiled ahead of time for archs that nobody has to have: each kernel, in each of its
configurations for an arch, in the formats that models use. What the compilers (Triton {versions}) said is below; it is
what *compiled* means on [Support](support.md). It says that code exists and fits, not that it is right or fast.

- **registers** a thread, the least and the most of all variants. NVIDIA's threads have 255 of them, CDNA's 512, RDNA's 256.
- **shared** is the most shared memory (LDS on AMD) of a block, of what the arch gives one block.
- **spilled** counts variants that keep registers in memory. What is let pass, and why, is under *Spills*; anything else
  fails the tests.

Rows of all {count} variants are in `docs/_data/triton_aot.json`. `python tests/triton/aot.py --stale` renews those whose
kernels or configurations have changed, and `python tools/triton_doc.py` this page.
"""


def render(rows: Sequence[Row] | None = None) -> str:
    """The page."""
    found: Sequence[Row] = json.loads(TABLE.read_text(encoding="utf-8")) if rows is None else rows
    versions = ", ".join(sorted({row["triton"] for row in found}))
    parts = [_HEAD.format(versions=versions, count=len(found)), *_kernels(found), *_spills(found)]
    return "\n".join(parts).rstrip() + "\n"


def _kernels(rows: Sequence[Row]) -> Iterator[str]:
    """A table a kernel, attention first."""
    names = sorted({row["kernel"] for row in rows}, key=lambda name: (".attention." not in name, name))
    for name in names:
        mine = [row for row in rows if row["kernel"] == name]
        yield f"## `{name}`\n"
        yield _line(("arch", "variants", "registers", "shared", "spilled"))
        yield _line(("---",) * 5)
        for arch in sorted({row["target"] for row in mine}, key=_order):
            yield _arch(arch, [row for row in mine if row["target"] == arch])
        yield ""


def _order(arch: str) -> tuple[str, int, str]:
    """Vendors apart; longer names, which are newer archs, later."""
    return arch[:2], len(arch), arch


def _arch(arch: str, rows: Sequence[Row]) -> str:
    good = [row for row in rows if not row.get("error")]
    if not good:
        return _line((arch, str(len(rows)), "does not compile", "", ""))
    registers = sorted(row["registers"] for row in good)
    span = str(registers[0]) if registers[0] == registers[-1] else f"{registers[0]} to {registers[-1]}"
    shared = f"{_kib(max(row['shared'] for row in good))} of {_kib(good[0]['shared_limit'])}"
    return _line((arch, str(len(rows)), span, shared, str(sum(map(bool, map(_spilled, good))))))


def _spilled(row: Row) -> int:
    """Bytes (NVIDIA) or registers (AMD) that live in memory."""
    return int(row.get("spilled", row["stack"]))


def _kib(size: int) -> str:
    return f"{size / 1024:.3g} KiB"


def _spills(rows: Sequence[Row]) -> Iterator[str]:
    yield "## Spills\n"
    spilled = [row for row in rows if not row.get("error") and _spilled(row)]
    if not spilled:
        yield "None."
        return
    yield (
        "Float32, whose products are not made by matrix units; heads of 256 on gfx11, whose matrix instructions want "
        "operands twice; every feature at once; sm_90, whose tiles are the fastest of those that were "
        "measured on it; and up to 32 bytes a thread on NVIDIA.\n"
    )
    yield _line(("arch", "kernel", "variant", "registers", "spilled"))
    yield _line(("---",) * 5)
    for row in sorted(spilled, key=lambda r: (_order(r["target"]), r["kernel"], r["label"])):
        unit = "bytes" if "spilled" not in row else "register" if row["spilled"] == 1 else "registers"
        name = row["kernel"].rpartition(":")[2]
        yield _line((row["target"], f"`{name}`", row["label"], str(row["registers"]), f"{_spilled(row)} {unit}"))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description="make docs/triton-resources.md")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is stale")
    given = parser.parse_args()
    made = render()
    if given.check:
        stale = not PAGE.exists() or PAGE.read_text(encoding="utf-8") != made
        print(f"docs/triton-resources.md is {'stale: run this without --check' if stale else 'up to date'}")
        return int(stale)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
