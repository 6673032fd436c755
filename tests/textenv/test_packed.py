"""Packed weights against plain products."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from textenv.packed import BFLOAT16_PACKS, EVERY_COUNT, FEW_ROWS, LARGE, PACK_FROM, ROUND_TO, WIDE, Packed

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")


@needs_onednn
@pytest.mark.parametrize("rows", [1, FEW_ROWS, EVERY_COUNT, EVERY_COUNT + 1, EVERY_COUNT + ROUND_TO])
@pytest.mark.parametrize("outputs", [320, 1280], ids=["small", "large"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_a_packed_layer_says_what_the_plain_one_says(rows: int, outputs: int, biased: bool, transposed: bool) -> None:
    x, weight, bias = torch.randn(rows, 160), torch.randn(outputs, 160), torch.randn(outputs) if biased else None
    packed = Packed.of(weight.t().contiguous().t() if transposed else weight, bias)
    assert packed is not None
    assert (packed.weight is None) == (weight.numel() >= LARGE)
    out = packed(x)
    assert out.is_contiguous()
    torch.testing.assert_close(out, F.linear(x, weight, bias), atol=1e-4, rtol=1e-4)


@needs_onednn
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_a_wide_layer_may_answer_feature_by_feature_where_that_is_said(biased: bool, transposed: bool) -> None:
    x, weight, bias = torch.randn(16, 112), torch.randn(112 * WIDE, 112), torch.randn(112 * WIDE) if biased else None
    packed = Packed.of(weight.t().contiguous().t() if transposed else weight, bias, any_layout=True)
    assert packed is not None
    assert packed.weight is not None
    assert packed.weight.is_contiguous()  # by input it would be multiplied 20 times slower
    out = packed(x)
    assert out.t().is_contiguous()
    torch.testing.assert_close(out, F.linear(x, weight, bias), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not BFLOAT16_PACKS, reason="needs a processor with bfloat16")
def test_half_precision_is_packed_too() -> None:
    x, weight = torch.randn(130, 160, dtype=torch.bfloat16), torch.randn(320, 160, dtype=torch.bfloat16)
    packed = Packed.of(weight, None)
    assert packed is not None
    out = packed(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), F.linear(x.float(), weight.float()), atol=0.3, rtol=0.02)


@pytest.mark.parametrize(
    "weight",
    [torch.randn(8, PACK_FROM // 8 - 1), torch.randn(320, 160, dtype=torch.float64)],
    ids=["small", "float64"],
)
def test_what_does_not_pay_or_cannot_be_is_left_as_it_lies(weight: torch.Tensor) -> None:
    assert Packed.of(weight, None) is None
