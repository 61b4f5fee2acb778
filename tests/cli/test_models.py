"""The well-known models that ``hal doctor`` and ``hal lock`` decide for."""

from __future__ import annotations

import pytest

from hal.cli._models import MODELS


def test_deepseeks_scale_is_that_of_its_context_extension() -> None:
    """YaRN by 40 with mscale_all_dim 1 scales q and k by 0.1 ln(40) + 1 each; prompts are the latents, expanded."""
    of = {m.name: m.request(**m.fields, dtype="bfloat16") for m in MODELS if m.name.startswith("DeepSeek")}
    latent, prompts = of["DeepSeek-V3"], of["DeepSeek-V3 prompts"]
    assert latent.softmax_scale == pytest.approx(0.1352337788608801)
    assert prompts == latent.expanded()
