"""HAL: a vendor-neutral hardware abstraction layer for the ops of large language models.

>>> import hal
>>> hal.__name__
'hal'

Importing this package imports no torch, reads no entry point and touches no device; everything below is loaded on use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "Anything": "_constraints",
    "Arch": "_arch",
    "Archs": "_kernel",
    "Attention": "_attention",
    "Band": "_kernel",
    "BoundOp": "_front",
    "ByOp": "_by_op",
    "Candidate": "_selection",
    "Constraint": "_constraints",
    "Device": "_device",
    "Either": "_constraints",
    "Erratum": "_errata",
    "Evidence": "_device",
    "KVCache": "_kv_cache",
    "Kernel": "_kernel",
    "Library": "_libraries",
    "MlaAttention": "_mla",
    "MlaCache": "_mla_cache",
    "MultipleOf": "_constraints",
    "NearMiss": "_near",
    "Needs": "_kernel",
    "OneOf": "_constraints",
    "PLUGIN_API": "_platform",
    "PRECEDENCE": "_selection",
    "Pairs": "_constraints",
    "PhaseChoice": "_selection",
    "Plan": "_plan",
    "Platform": "_platform",
    "PluginRecord": "_plugins",
    "Probe": "_device",
    "Range": "_constraints",
    "Reason": "_reason",
    "SameAs": "_constraints",
    "Selection": "_selection",
    "Setting": "_settings",
    "Version": "_version",
    "Windows": "_constraints",
    "Workspace": "_workspace",
    "assert_same_decisions": "_lock",
    "device": "_devices",
    "devices": "_devices",
    "diff_locks": "_lock",
    "get_attention": "_front",
    "get_attentions": "_front",
    "get_mla_attention": "_mla",
    "get_op": "_front",
    "installed": "_libraries",
    "load_errata": "_errata",
    "merge_attention_states": "_merge",
    "override": "_settings",
    "plugins": "_plugins",
    "probe_report": "_devices",
    "receipts": "_front",
    "reset": "_reset",
    "select": "_selection",
    "simulate": "_simulate",
    "torch_build": "_libraries",
    "workspace": "_workspace",
    "write_lock": "_lock",
}

__all__ = [
    "Anything",
    "Arch",
    "Archs",
    "Attention",
    "Band",
    "BoundOp",
    "ByOp",
    "Candidate",
    "Constraint",
    "Device",
    "Either",
    "Erratum",
    "Evidence",
    "KVCache",
    "Kernel",
    "Library",
    "MlaAttention",
    "MlaCache",
    "MultipleOf",
    "NearMiss",
    "Needs",
    "OneOf",
    "PLUGIN_API",
    "PRECEDENCE",
    "Pairs",
    "PhaseChoice",
    "Plan",
    "Platform",
    "PluginRecord",
    "Probe",
    "Range",
    "Reason",
    "SameAs",
    "Selection",
    "Setting",
    "Version",
    "Windows",
    "Workspace",
    "assert_same_decisions",
    "device",
    "devices",
    "diff_locks",
    "errors",
    "get_attention",
    "get_attentions",
    "get_mla_attention",
    "get_op",
    "installed",
    "load_errata",
    "merge_attention_states",
    "override",
    "plugins",
    "probe_report",
    "receipts",
    "reset",
    "select",
    "simulate",
    "testing",
    "torch_build",
    "workspace",
    "write_lock",
]

if TYPE_CHECKING:
    from hal import errors as errors
    from hal import testing as testing
    from hal._arch import Arch as Arch
    from hal._attention import Attention as Attention
    from hal._by_op import ByOp as ByOp
    from hal._constraints import Anything as Anything
    from hal._constraints import Constraint as Constraint
    from hal._constraints import Either as Either
    from hal._constraints import MultipleOf as MultipleOf
    from hal._constraints import OneOf as OneOf
    from hal._constraints import Pairs as Pairs
    from hal._constraints import Range as Range
    from hal._constraints import SameAs as SameAs
    from hal._constraints import Windows as Windows
    from hal._device import Device as Device
    from hal._device import Evidence as Evidence
    from hal._device import Probe as Probe
    from hal._devices import device as device
    from hal._devices import devices as devices
    from hal._devices import probe_report as probe_report
    from hal._errata import Erratum as Erratum
    from hal._errata import load_errata as load_errata
    from hal._front import BoundOp as BoundOp
    from hal._front import get_attention as get_attention
    from hal._front import get_attentions as get_attentions
    from hal._front import get_op as get_op
    from hal._front import receipts as receipts
    from hal._kernel import Archs as Archs
    from hal._kernel import Band as Band
    from hal._kernel import Kernel as Kernel
    from hal._kernel import Needs as Needs
    from hal._kv_cache import KVCache as KVCache
    from hal._libraries import Library as Library
    from hal._libraries import installed as installed
    from hal._libraries import torch_build as torch_build
    from hal._lock import assert_same_decisions as assert_same_decisions
    from hal._lock import diff_locks as diff_locks
    from hal._lock import write_lock as write_lock
    from hal._merge import merge_attention_states as merge_attention_states
    from hal._mla import MlaAttention as MlaAttention
    from hal._mla import get_mla_attention as get_mla_attention
    from hal._mla_cache import MlaCache as MlaCache
    from hal._near import NearMiss as NearMiss
    from hal._plan import Plan as Plan
    from hal._platform import PLUGIN_API as PLUGIN_API
    from hal._platform import Platform as Platform
    from hal._plugins import PluginRecord as PluginRecord
    from hal._plugins import plugins as plugins
    from hal._reason import Reason as Reason
    from hal._reset import reset as reset
    from hal._selection import PRECEDENCE as PRECEDENCE
    from hal._selection import Candidate as Candidate
    from hal._selection import PhaseChoice as PhaseChoice
    from hal._selection import Selection as Selection
    from hal._selection import select as select
    from hal._settings import Setting as Setting
    from hal._settings import override as override
    from hal._simulate import simulate as simulate
    from hal._version import Version as Version
    from hal._workspace import Workspace as Workspace
    from hal._workspace import workspace as workspace


def __getattr__(name: str) -> Any:
    if name in ("errors", "testing"):
        return importlib.import_module(f"hal.{name}")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'hal' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"hal.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
