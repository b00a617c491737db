"""Codecs: the numbers that each library says its bytes mean, whatever rows are asked for, in whatever dtype."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fs_fwdllm.model.base.codecs import Awq, Codebook, Codec, Gptq, PackedWords, Plain, RowBytes, ScaledBytes, state_of
from fs_fwdllm.model.base.packing import Form, group_of, pack

#: Tensors that bitsandbytes wrote, with what its own (generic) dequantisation makes of them, under "=".
_BITSANDBYTES = Path(__file__).with_name("bitsandbytes.npz")
_FORMS = [Form("int8"), Form("int4"), Form("int4", symmetric=False), Form("int8", 32, symmetric=False), Form("nf4")]


def rows_of(codec: Codec, parts: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The whole matrix, by blocks of a size that divides nothing."""
    step = codec.row_multiple * 3
    blocks = []
    for first in range(0, codec.out_features, step):
        last = min(first + step, codec.out_features)
        scratch = torch.full((step * codec.in_features + 5,), torch.nan, dtype=dtype)
        blocks.append(codec.rows(parts, first, last, scratch).clone())
    return torch.cat(blocks)


def weight(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(7)).to(dtype)


def bits_of(words: torch.Tensor, width: int) -> list[list[int]]:
    """Numbers of ``width`` bits in each row of 32-bit words, the lowest first, by arithmetic on Python's integers."""
    found = []
    for row in words.tolist():
        whole = sum((word & 0xFFFFFFFF) << 32 * index for index, word in enumerate(row))
        found.append([whole >> width * index & (1 << width) - 1 for index in range(len(row) * 32 // width)])
    return found


@pytest.mark.parametrize("form", _FORMS, ids=lambda form: f"{form.name}-{form.group}-{form.symmetric}")
@pytest.mark.parametrize("shape", [(24, 64), (50, 128), (7, 96), (40, 688)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_weight_is_within_half_a_step(form: Form, shape: tuple[int, int], dtype: torch.dtype) -> None:
    if form.name == "nf4" and shape[0] * shape[1] % 64:
        pytest.skip("blocks of 64 do not divide this matrix")
    given = weight(*shape, dtype)
    codec, parts = pack(given, form)
    found = rows_of(codec, parts)
    error = (found - given.float()).abs()
    group = group_of(form, *shape) or 0
    if form.name == "nf4":
        largest = given.float().reshape(-1, group).abs().amax(dim=1, keepdim=True)
        assert (error.reshape(-1, group) <= 0.1521 * largest).all()  # half the widest gap between two quantiles
        return
    step = parts["weight_scale"].float()[:, :, None]
    inside = error.view(shape[0], -1, group) / step
    clipped = (1 << form.bits) * torch.finfo(dtype).eps  # by the rounding of the scale
    assert inside.max() <= 0.5 + clipped + 1e-3
    assert inside.mean() < 0.27  # a quarter of a step, as of any rounding to nearest


@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("ordered", [True, False])
def test_words_against_arithmetic_on_integers(width: int, zeros: bool, ordered: bool) -> None:
    rows, columns, groups = 20, 48, 3
    in_word = 32 // width
    generator = torch.Generator().manual_seed(width)

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(1 << 31), 1 << 31, shape, generator=generator).to(torch.int32)

    parts = {"weight_packed": words(rows, columns // in_word), "weight_scale": torch.rand(rows, groups)}
    zero_rows = [[float(1 << width - 1)] * groups for _ in range(rows)]
    if zeros:
        parts["weight_zero_point"] = words(-(-rows // in_word), groups)
        columns_of_zeros = bits_of(parts["weight_zero_point"].T, width)
        zero_rows = [[float(columns_of_zeros[group][row]) for group in range(groups)] for row in range(rows)]
    place = [column * groups // columns for column in range(columns)]
    if not ordered:
        random.Random(1).shuffle(place)
        parts["weight_g_idx"] = torch.tensor(place, dtype=torch.int32)
    numbers, scale = bits_of(parts["weight_packed"], width), parts["weight_scale"]
    expected = [
        [(numbers[row][c] - zero_rows[row][place[c]]) * scale[row, place[c]] for c in range(columns)]
        for row in range(rows)
    ]
    assert torch.equal(rows_of(PackedWords(rows, columns, width=width), parts), torch.tensor(expected))


@pytest.mark.parametrize("form", _FORMS[:4], ids=lambda form: f"{form.name}-{form.symmetric}")
def test_our_words_are_those_of_compressed_tensors(form: Form) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    given = weight(40, 96)
    codec, parts = pack(given, form)
    numbers = helpers.unpack_from_int32(parts["weight_packed"], form.bits, torch.Size((40, 96)))
    scale = parts["weight_scale"]
    zeros = torch.zeros(scale.shape)
    if not form.symmetric:
        zeros = helpers.unpack_from_int32(parts["weight_zero_point"], form.bits, scale.shape, packed_dim=0).float()
    grouped = numbers.float().view(40, scale.shape[1], -1)
    assert torch.equal(((grouped - zeros[:, :, None]) * scale[:, :, None]).view(40, 96), rows_of(codec, parts))


def bitsandbytes_cases() -> list[str]:
    with np.load(_BITSANDBYTES) as file:
        return sorted({name.partition("/")[0] for name in file.files})


@pytest.mark.parametrize("case", bitsandbytes_cases())
def test_bitsandbytes_own_numbers(case: str) -> None:
    with np.load(_BITSANDBYTES) as file:
        found = {name.partition("/")[2]: torch.from_numpy(file[name]) for name in file.files if name.startswith(case)}
    expected = found.pop("=")
    rows, columns = expected.shape
    codec: Codec = RowBytes(rows, columns)
    if "SCB" not in found:
        state = state_of(next(tensor for name, tensor in found.items() if "quant_state" in name))
        nested = {name: state[f"nested_{name}"] for name in ("blocksize", "offset")} if "nested" in case else {}
        codec = Codebook(
            rows, columns, state["blocksize"], nested.get("blocksize", 0), nested.get("offset", 0.0)
        )  # fmt: skip
    assert torch.equal(rows_of(codec, found), expected)


def test_our_normal_floats_are_the_bytes_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    given = weight(32, 128)
    packed, state = functional.quantize_4bit(given, blocksize=64, quant_type="nf4")
    parts = pack(given, Form("nf4"))[1]
    assert torch.equal(packed, parts["weight"]) and torch.equal(state.absmax, parts["weight.absmax"])
    assert torch.equal(state.code, parts["weight.quant_map"])


@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("ordered", [True, False])
def test_gptq_against_arithmetic_on_integers(width: int, shift: int, ordered: bool) -> None:
    rows, columns, groups = 24, 32, 2  # of the weight [out, in]
    generator = torch.Generator().manual_seed(width)
    in_word, levels = 32 // width, 1 << width
    parts = {
        "qweight": torch.randint(-(1 << 31), 1 << 31, (columns // in_word, rows), generator=generator).to(torch.int32),
        "qzeros": torch.randint(-(1 << 31), 1 << 31, (groups, rows // in_word), generator=generator).to(torch.int32),
        "scales": torch.rand(groups, rows, generator=generator).half(),
    }
    place = [column * groups // columns for column in range(columns)]
    if not ordered:
        random.Random(1).shuffle(place)
        parts["g_idx"] = torch.tensor(place, dtype=torch.int32)
    numbers, zeros = bits_of(parts["qweight"].T, width), bits_of(parts["qzeros"], width)
    scale = parts["scales"].float()
    expected = [
        [
            (numbers[row][c] - (zeros[place[c]][row] + shift) % levels) * scale[place[c], row]
            for c in range(columns)
        ]
        for row in range(rows)
    ]  # fmt: skip
    assert torch.equal(rows_of(Gptq(rows, columns, width=width, shift=shift), parts), torch.tensor(expected))


def test_awq_against_arithmetic_on_integers() -> None:
    rows, columns, groups = 24, 32, 2
    generator = torch.Generator().manual_seed(0)
    parts = {
        "qweight": torch.randint(-(1 << 31), 1 << 31, (columns, rows // 8), generator=generator).to(torch.int32),
        "qzeros": torch.randint(-(1 << 31), 1 << 31, (groups, rows // 8), generator=generator).to(torch.int32),
        "scales": torch.rand(groups, rows, generator=generator).half(),
    }
    #: the nibble of a word in which a column of eight is kept
    nibble = {column: index for index, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7))}
    numbers, zeros = bits_of(parts["qweight"], 4), bits_of(parts["qzeros"], 4)
    place = [8 * (row // 8) + nibble[row % 8] for row in range(rows)]
    expected = [
        [
            (numbers[c][place[row]] - zeros[c * groups // columns][place[row]])
            * float(parts["scales"][c * groups // columns, row])
            for c in range(columns)
        ]
        for row in range(rows)
    ]
    assert torch.equal(rows_of(Awq(rows, columns), parts), torch.tensor(expected))


@pytest.mark.parametrize("scales", [(), (1,), (16, 1), (16, 4)])
def test_scaled_bytes_with_scales_of_any_kind(scales: tuple[int, ...]) -> None:
    numbers = torch.randint(-128, 128, (16, 24), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    scale = torch.rand(scales)
    wide = scale.expand(16, 1) if scale.numel() == 1 else scale
    expected = (numbers.float().view(16, wide.shape[1], -1) * wide[:, :, None]).view(16, 24)
    assert torch.equal(rows_of(ScaledBytes(16, 24), {"weight": numbers, "weight_scale": scale}), expected)


def test_bytes_in_floating_point() -> None:
    numbers = weight(16, 24).to(torch.float8_e4m3fn)
    expected = numbers.float() * 0.5
    found = rows_of(ScaledBytes(16, 24), {"weight": numbers, "weight_scale": torch.tensor(0.5)})
    assert torch.equal(found, expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_weights_are_what_they_are(transposed: bool, dtype: torch.dtype) -> None:
    given = weight(12, 10, dtype)
    parts: dict[str, Any] = {"weight": given.T.contiguous() if transposed else given}
    assert torch.equal(rows_of(Plain(12, 10, transposed=transposed), parts), given.float())


def test_groups_are_the_largest_that_divide_a_row() -> None:
    assert group_of(Form("int4", 64), 8, 4096) == 64
    assert group_of(Form("int4", 64), 8, 688) == 43
    assert group_of(Form("int4", 128), 8, 96) == 96
    assert group_of(Form("int4", 64), 8, 8 * 7) == 56
    assert group_of(Form("int4", 64), 8, 37) is None  # a prime number
    assert group_of(Form("int4", 64), 8, 20) is None  # words would straddle rows
    assert group_of(Form("nf4", 64), 3, 32) is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_packed(value: float) -> None:
    given = weight(8, 64)
    given[3, 5] = value
    with pytest.raises(ValueError, match="not finite"):
        pack(given, Form("int4"))


def test_a_group_of_zeros_stays_zero() -> None:
    for form in _FORMS:
        codec, parts = pack(torch.zeros(8, 64), form)
        assert not rows_of(codec, parts).any()
