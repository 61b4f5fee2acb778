"""Op contracts, references and portable kernels. Usable without ``hal``; importing it imports no torch."""

from hal_ops._dtypes import DTYPES, FP8_DTYPES, dtype_name, is_fp8, torch_dtype
from hal_ops._op import Op, resolve_target
from hal_ops._record import record
from hal_ops._request import AUTO, FieldRule, Request, feature, required

__all__ = [
    "AUTO",
    "DTYPES",
    "FP8_DTYPES",
    "FieldRule",
    "Op",
    "Request",
    "dtype_name",
    "feature",
    "is_fp8",
    "record",
    "required",
    "resolve_target",
    "torch_dtype",
]
