"""llama.cpp's forms give the numbers that the package gguf gives, to the bit, whatever the bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from fs_fwdllm.model.base.block_codecs import BLOCK_CODECS, Reordered
from fs_fwdllm.model.base.codecs import Plain
from fs_fwdllm.model.gguf_file import GGUF_FORMS

ROWS, COLUMNS = 12, 512
FORMS = {form.name: form for form in GGUF_FORMS.values() if not form.is_float}


def packed(form: str, *, sensible: bool) -> torch.Tensor:
    """``ROWS`` rows of random bytes; where sensible, with scales that are ordinary numbers."""
    generator = np.random.default_rng(7)
    blocks = generator.integers(0, 256, (ROWS * COLUMNS // FORMS[form].numbers, FORMS[form].bytes), dtype=np.uint8)
    if sensible:
        places = {"Q6_K": (208,), "Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,)}.get(form, (0, 2))
        for place in places:
            scales = generator.normal(0, 0.01, (len(blocks), 1)).astype(np.float16)
            blocks[:, place : place + 2] = scales.view(np.uint8)
    return torch.from_numpy(blocks.reshape(ROWS, -1))


def reference(form: str, weight: torch.Tensor) -> torch.Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(quants.dequantize(weight.numpy(), GGMLQuantizationType[form]))


def numbers(codec, weight: torch.Tensor, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:  # type: ignore[no-untyped-def]
    scratch = torch.full((ROWS * COLUMNS + 5,), torch.nan, dtype=dtype)
    return codec.rows({"weight": weight}, first, last, scratch)


def test_every_form_that_is_read_has_a_codec_of_its_size() -> None:
    assert set(FORMS) == set(BLOCK_CODECS)
    for name, codec in BLOCK_CODECS.items():
        assert (codec.numbers, codec.block_bytes) == (FORMS[name].numbers, FORMS[name].bytes)
        assert codec(ROWS, COLUMNS).bits == 8 * FORMS[name].bytes / FORMS[name].numbers


@pytest.mark.parametrize("sensible", [True, False], ids=["numbers", "any bytes"])
@pytest.mark.parametrize("form", BLOCK_CODECS)
def test_numbers_are_those_of_the_library_to_the_bit(form: str, sensible: bool) -> None:
    weight = packed(form, sensible=sensible)
    expected = reference(form, weight)
    codec = BLOCK_CODECS[form](ROWS, COLUMNS)
    for first, last in ((0, ROWS), (3, 4), (5, 11)):
        found = numbers(codec, weight, first, last, torch.float32)
        assert np.array_equal(found.numpy(), expected[first:last].numpy(), equal_nan=True)
        known = ~expected[first:last].isnan()  # of what is not a number, the bits say nothing
        assert torch.equal(found.view(torch.int32)[known], expected[first:last].view(torch.int32)[known])
    assert expected.isfinite().all() or not sensible


@pytest.mark.parametrize("form", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_what_the_library_packs_comes_back_as_it_says(form: str) -> None:
    matrix = np.random.default_rng(1).normal(0, 0.1, (ROWS, COLUMNS)).astype(np.float32)
    weight = torch.from_numpy(quants.quantize(matrix, GGMLQuantizationType[form]))
    found = numbers(BLOCK_CODECS[form](ROWS, COLUMNS), weight, 0, ROWS, torch.float32)
    assert torch.equal(found, reference(form, weight))
    assert np.abs(found.numpy() - matrix).max() < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", BLOCK_CODECS)
def test_in_half_precision_they_are_rounded_a_few_times(form: str, dtype: torch.dtype) -> None:
    weight = packed(form, sensible=True)
    expected = reference(form, weight)
    found = numbers(BLOCK_CODECS[form](ROWS, COLUMNS), weight, 0, ROWS, dtype)
    assert found.dtype == dtype
    largest = expected.abs().max()
    assert bool(((found.float() - expected).abs() <= 4 * torch.finfo(dtype).eps * largest).all())


@pytest.mark.parametrize("form", ["Q4_K", "Q8_0", "F16"])
def test_rows_in_another_order_are_the_same_rows(form: str) -> None:
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(3))
    if form == "F16":
        weight, kept = torch.randn(ROWS, COLUMNS).half(), Plain(ROWS, COLUMNS, element_bits=16)
        expected = weight.float()
    else:
        weight, kept = packed(form, sensible=True), BLOCK_CODECS[form](ROWS, COLUMNS)  # type: ignore[assignment]
        expected = reference(form, weight)
    codec = Reordered(ROWS, COLUMNS, kept, order)
    for first, last in ((0, ROWS), (2, 7)):
        assert torch.equal(numbers(codec, weight, first, last, torch.float32), expected[order[first:last]])
    assert codec.bits == kept.bits
