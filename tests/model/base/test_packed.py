"""A packed linear layer computes what an ordinary one with its numbers computes, and nobody sees the difference."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import jvp, vmap

from fs_fwdllm.model.base.packed import PackedLinear, elements_of, packed_layers, unpack
from fs_fwdllm.model.base.packing import Form, pack


def layers(
    rows: int, columns: int, form: Form | None = None, bias: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[PackedLinear, nn.Linear]:
    """A packed layer, and an ordinary one over its numbers."""
    generator = torch.Generator().manual_seed(2)
    codec, parts = pack(torch.randn(rows, columns, generator=generator), form or Form("int4", 32))
    offset = nn.Parameter(torch.randn(rows, generator=generator).to(dtype), requires_grad=False) if bias else None
    packed = PackedLinear(codec, parts, offset, dtype)
    plain = nn.Linear(columns, rows, bias=bias, dtype=dtype)
    plain.weight = nn.Parameter(packed.dequantised(dtype), requires_grad=False)
    plain.bias = offset  # type: ignore[assignment]
    return packed, plain


def inputs(columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 5, columns, generator=torch.Generator().manual_seed(4)).to(dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [Form("int8"), Form("int4", symmetric=False), Form("nf4")], ids=lambda form: form.name)
def test_the_product_is_that_of_its_numbers(form: Form, dtype: torch.dtype, bias: bool) -> None:
    packed, plain = layers(96, 128, form, bias, dtype)
    given = inputs(128, dtype)
    close = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}  # a bias is added to what is rounded
    torch.testing.assert_close(packed(given), plain(given), **close)
    assert packed(given).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 27, 64])
def test_its_bits_are_those_of_an_ordinary_layer(rows: int, dtype: torch.dtype) -> None:
    """Bias and all: processors differ in whether a product plus a bias is what one call gives for the two."""
    packed, plain = layers(96, 64, dtype=dtype)
    given = torch.randn(rows, 64, generator=torch.Generator().manual_seed(4)).to(dtype)
    assert torch.equal(packed(given), plain(given))


def test_a_matrix_of_several_blocks_is_one_product_after_the_other() -> None:
    packed, plain = layers(300, 8192, Form("int4", 128))
    assert len(list(packed.blocks(torch.float32, torch.device("cpu")))) > 2
    # The order in which 8,192 terms are summed is the processor's; what it may cost follows from their size.
    given, weight = inputs(8192).double(), plain.weight.double()
    offset = 0.0 if plain.bias is None else plain.bias.double()
    bound = 8 * torch.finfo(torch.float32).eps * (given.abs() @ weight.abs().T)
    assert bool(((packed(inputs(8192)).double() - (given @ weight.T + offset)).abs() <= bound).all())


def test_batching_and_forward_mode_go_through_it() -> None:
    packed, plain = layers(40, 64)
    given, tangent = inputs(64), inputs(64).flip(0)
    with torch.no_grad():
        stack = torch.stack([given, 2 * given, -given])
        torch.testing.assert_close(vmap(packed)(stack), packed(stack))
        value, slope = jvp(packed, (given,), (tangent,))
        expected_value, expected_slope = jvp(plain, (given,), (tangent,))
        torch.testing.assert_close((value, slope), (expected_value, expected_slope))
        several = vmap(lambda direction: jvp(packed, (given,), (direction,))[1])(torch.stack([tangent, given]))
        torch.testing.assert_close(several[0], expected_slope)


def test_the_gradient_of_its_input_is_that_of_an_ordinary_layer() -> None:
    packed, plain = layers(300, 8192, Form("int4", 128))
    gradients = []
    for layer in (packed, plain):
        given = inputs(8192).requires_grad_(True)
        wide = layer(given).repeat(1, 1, 28)[..., :8192]
        layer(wide).square().mean().backward()
        assert given.grad is not None
        gradients.append(given.grad / given.grad.abs().max())
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_a_trained_bias_gets_its_gradient_without_and_with_one_of_the_input() -> None:
    for needs in (False, True):
        packed, plain = layers(40, 64)
        found = []
        for layer in (packed, plain):
            layer.bias = nn.Parameter(layer.bias.detach().clone())
            layer(inputs(64).requires_grad_(needs)).square().sum().backward()
            found.append(layer.bias.grad)
        torch.testing.assert_close(*found)


def test_its_weight_has_a_shape_and_no_numbers() -> None:
    packed, plain = layers(40, 64, dtype=torch.bfloat16)
    assert isinstance(packed, nn.Linear) and packed.weight.shape == plain.weight.shape
    assert packed.weight.dtype == torch.bfloat16 and packed.weight.untyped_storage().nbytes() < 16
    assert packed.weight.isnan().all()  # whoever computes with it does not get a number that looks right


def test_a_change_of_dtype_leaves_the_packed_numbers_alone() -> None:
    packed, _ = layers(40, 64)
    before = packed.dequantised()
    packed.to(torch.float16)
    assert packed.weight.dtype == torch.float16 and torch.equal(packed.dequantised(), before)


def test_its_tensors_are_saved_under_the_library_s_names() -> None:
    packed, _ = layers(40, 64, Form("nf4"))
    model = nn.Sequential(packed)
    names = set(model.state_dict())
    assert names == {"0.bias", "0.weight", "0.weight.absmax", "0.weight.quant_map"} | {
        "0.weight.quant_state.bitsandbytes__nf4"
    }


def test_a_copy_is_a_layer_of_its_own() -> None:
    packed, _ = layers(40, 64)
    other = copy.deepcopy(packed)
    other.get_buffer("packed_weight_scale").zero_()
    assert not other(inputs(64)).equal(packed(inputs(64)))


def test_unpacking_puts_an_ordinary_layer_in_its_place() -> None:
    first, _ = layers(40, 64)
    second, _ = layers(24, 40)
    model = nn.Sequential(first, nn.Sequential(second)).eval()
    expected, elements = model(inputs(64)), elements_of(model)
    unpack(model, ["1.0"])
    assert [name for name, _ in packed_layers(model)] == ["0"]
    unpack(model)
    assert not packed_layers(model) and elements_of(model) == elements == 40 * 64 + 40 + 24 * 40 + 24
    torch.testing.assert_close(model(inputs(64)), expected)
