"""``Traced``: how an op of one phase stands in the graph of a compiler that traces it. Needs no torch."""

from __future__ import annotations

from hal_ops._record import record

__all__ = ["Traced"]


@record(frozen=True)
class Traced:
    """The signature of an op's call in torch's schema language, and what comes out.

    Fields:
        arguments: the call's arguments in order, as in ``"Tensor x, Tensor(a!) residual, *, Tensor? bias=None"``: those
            with a ``!`` are changed, those after the star are keywords. ``out`` is not among them.
        outputs: target of a factory ``request -> fn``, where ``fn`` takes the same arguments and returns empty outputs
            of the right shapes, dtypes and strides: a Tensor, or a tuple where ``results`` is above 1.
        results: how many tensors the call returns, and ``out=`` takes. 0: it only changes its arguments.
        takes_out: the call has ``out=``.
    """

    arguments: str
    outputs: str
    results: int = 1
    takes_out: bool = True
