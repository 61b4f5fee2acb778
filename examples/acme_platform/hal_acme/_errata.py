"""What is known to be wrong with Acme's hardware and software."""

from __future__ import annotations

import hal

__all__ = ["ERRATA"]

ERRATA = (
    hal.Erratum(
        id="ACME-17",
        kernels=("acme.prefill",),
        platform="acme",
        archs=("acme1",),
        when={"head_dim": hal.Range(low=129)},
        summary="the accumulator of acme1 overflows for head_dim above 128",
        url="https://acme.example/errata/17",
    ),
)
