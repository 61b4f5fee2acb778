"""The conformance kit: whether kernels compute the right thing, and whether plugins keep the contract.

* :func:`corners` generates requests from a kernel's declaration; :func:`check` runs one against the reference.
* :func:`verify` does so for all kernels of a device and keeps the results in the ledger (``hal verify``).
* :func:`conformance` and :class:`PluginConformance` hold a plugin against the contract; no hardware is needed.
* :func:`decision_matrix` and :func:`winners` are tables of decisions; :func:`make_platform` makes hardware up.
* ``hal.testing.fixtures`` has pytest fixtures: ``pytest_plugins = ["hal.testing.fixtures"]``.

Importing it imports no torch.
"""

from hal.testing._check import Result, check
from hal.testing._conformance import Check, ConformanceReport, PluginConformance, conformance
from hal.testing._corners import corners, request_id
from hal.testing._matrix import decision_matrix, winners
from hal.testing._platforms import make_platform
from hal.testing._verify import verify

__all__ = [
    "Check",
    "ConformanceReport",
    "PluginConformance",
    "Result",
    "check",
    "conformance",
    "corners",
    "decision_matrix",
    "make_platform",
    "request_id",
    "verify",
    "winners",
]
