"""The cases of latent attention, M1 to M4 of the grid, and who runs them.

FLOP: 2 for each product of a query with a key that it sees, and of a weight with a value. Bytes: q and out once, and once
each entry that some query sees.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from grid import COLD, JUDGED, pages_of
from sides import MissingError, Runs, Side, refusal
from timing import reason_of
from torch import Tensor

import hal
from hal.errors import HalError, NoKernelError
from hal_ops.attention.reference import prefill as reference
from hal_ops.mla_attention import MlaAttentionRequest

__all__ = ["LATENTS", "LatentCase", "LatentInputs", "latent_runs_of"]

KERNELS = {"flashinfer": ("flashinfer_fa3", "flashinfer_fa2", "flashinfer_cutlass")}
"""Names of a side's kernels, where they are not its own."""


@dataclasses.dataclass(frozen=True)
class LatentCase:
    """``lengths``: (queries, keys) a row. Pages are of 64 tokens, as FlashMLA has them."""

    name: str
    heads: int
    lengths: tuple[tuple[int, int], ...]
    rank: int = 512
    rope: int = 64
    page: int = 64

    phase = "latent"

    @property
    def id(self) -> str:
        return self.name.partition(" ")[0]

    def request(self) -> MlaAttentionRequest:
        """What is asked for: steps of decode."""
        return MlaAttentionRequest(
            num_q_heads=self.heads, kv_lora_rank=self.rank, qk_rope_head_dim=self.rope, page_size=self.page,
            max_q_len=self.lengths[0][0], phases=("decode",),
        )  # fmt: skip

    def flop(self) -> float:
        pairs = sum(q * kv - q * (q - 1) // 2 for q, kv in self.lengths)
        return 2.0 * self.heads * (2 * self.rank + self.rope) * pairs

    def num_bytes(self) -> float:
        queries, keys = (sum(x) for x in zip(*self.lengths, strict=True))
        return 2.0 * (queries * self.heads * (2 * self.rank + self.rope) + keys * (self.rank + self.rope))

    def quick(self) -> LatentCase:
        """The same in small, to try it out."""
        small = tuple((q, min(kv, 24)) for q, kv in self.lengths[:2])
        return dataclasses.replace(self, heads=2, lengths=small, rank=32, rope=16, page=16)


LATENTS = (
    LatentCase("M1 DeepSeek-V3 TP8 B128 4k", 16, ((1, 4096),) * 128),
    LatentCase("M2 DeepSeek-V3 DP B128 4k", 128, ((1, 4096),) * 128),
    LatentCase("M3 DeepSeek-V3 DP B1 32k", 128, ((1, 32768),)),
    LatentCase("M4 DeepSeek-V3 TP8 B128 4k 2 queries", 16, ((2, 4096),) * 128),
)


@dataclasses.dataclass
class LatentInputs:
    """A case on a device: ``sets`` of q ``[tokens, heads, rank + rope]`` and of pages, and ``table`` as in the grid."""

    case: LatentCase
    device: str
    sets: list[tuple[Tensor, Tensor]]
    table: Tensor

    @staticmethod
    def of(case: LatentCase, device: str) -> LatentInputs:
        torch.manual_seed(0)
        table, pages = pages_of(case.lengths, case.page)
        count = min(64, 1 + int(COLD // case.num_bytes())) if torch.device(device).type != "cpu" else 1
        entry, tokens = case.rank + case.rope, sum(q for q, _ in case.lengths)
        sets = [
            (
                torch.randn(tokens, case.heads, entry, device=device).bfloat16(),
                torch.randn(pages, case.page, entry, device=device).bfloat16(),
            )
            for _ in range(count)
        ]
        return LatentInputs(case, device, sets, table)

    def judge(self, out: Tensor) -> float:
        """How far an output for the first set is from float32, over the last queries of the first and the last row."""
        case, (q, cache) = self.case, self.sets[0]
        ends = torch.tensor([n for n, _ in case.lengths]).cumsum(0).tolist()
        right = reference(case.request().absorbed().replace(phases=("prefill",)), self.device, rounded=False)
        wrong = size = 0.0
        for row in sorted({0, len(ends) - 1}):
            count, length = min(JUDGED, case.lengths[row][0]), case.lengths[row][1]
            pages = self.table[row, : -(-length // case.page)].long().to(self.device)
            keys = cache[pages].flatten(0, 1)[None, :length, None]
            mine = slice(ends[row] - count, ends[row])
            wanted = right(q[None, mine], keys, keys[..., : case.rank])[0].float()
            wrong += float((out[mine].float() - wanted).square().sum())
            size += float(wanted.square().sum())
        return math.sqrt(wrong / size)


def latent_runs_of(side: Side, inputs: LatentInputs) -> Runs:
    """The calls of a side for a case, planned.

    Raises:
        MissingError: with the reasons of each of its kernels.
    """
    found = []
    for name in KERNELS.get(side.name, side.libraries):
        try:
            return _bound(name, inputs)
        except MissingError as error:
            found.append(f"{name}: {error}")
    raise MissingError(" | ".join(dict.fromkeys(found)))


def _bound(name: str, inputs: LatentInputs) -> Runs:
    case, request = inputs.case, inputs.case.request()
    fields = ("num_q_heads", "kv_lora_rank", "qk_rope_head_dim", "page_size", "max_q_len", "phases")
    given = {field: getattr(request, field) for field in fields}
    try:
        handle = hal.get_mla_attention(**given, device=inputs.device, kernel=name)
    except NoKernelError as error:
        raise MissingError(refusal(error, name, "decode")) from error
    except HalError as error:
        raise MissingError(reason_of(error)) from error
    q_lens, kv_lens = zip(*case.lengths, strict=True)
    plan = handle.plan(q_lens=q_lens, kv_lens=kv_lens, block_table=inputs.table)
    caches = [hal.MlaCache(pages) for _, pages in inputs.sets]

    def call(index: int) -> Tensor:
        out: Tensor = handle(inputs.sets[index][0], cache=caches[index], plan=plan)
        return out

    calls = [lambda i=i: call(i) for i in range(len(caches))]  # type: ignore[misc]
    return Runs(calls, handle.kernels()["decode"])
