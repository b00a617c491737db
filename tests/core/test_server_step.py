"""The server's step against a slow float32 reference, whole and in chunks, in both libraries; and against PyTorch's."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as drawn

from fs_fwdllm.core.arrays import NUMPY
from fs_fwdllm.core.direction import DirectionKey, Rademacher
from fs_fwdllm.core.replay import BUFFERS, Contributions, Replayer
from fs_fwdllm.core.server_step import MOMENTS, AdamStep, MomentumStep, PlainStep, server_step
from fs_fwdllm.core.torch_arrays import TorchArrays
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.method.forward.server_optimizer import Adam, Sgd
from tests.core.test_arrays import DEVICE, in_torch, same_bits

RUN_SEED = 5
SHAPES = st.lists(drawn.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9), min_size=1, max_size=3)
BETAS = st.floats(0, 1, exclude_max=True)
SLOPES = st.lists(st.floats(-1e3, 1e3, width=32), min_size=0, max_size=3)


def start_of(shapes, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"t{index}": np.asarray(rng.normal(size=shape), dtype=np.float32) for index, shape in enumerate(shapes)}


def replayer_of(start: dict[str, np.ndarray], *, chunk: int = 1 << 19, in_pytorch: bool = False) -> Replayer:
    place = in_torch if in_pytorch else np.copy
    return Replayer(Trainables({name: place(values) for name, values in start.items()}), RUN_SEED, Rademacher(), chunk)


def contributions_of(slopes, step: int) -> Contributions:
    return Contributions(range(100 * step, 100 * step + len(slopes)), np.array(slopes, dtype=np.float32))


def slow_adam(start, rounds, optimizer: Adam, *, decay: float, rate: float) -> list[np.ndarray]:
    """Adam as the formulas have it: whole tensors, every direction written out, each operation rounded to float32."""
    f32 = np.float32
    parameters = [values.copy() for values in start.values()]
    first = [np.zeros_like(values) for values in parameters]
    second = [np.zeros_like(values) for values in parameters]
    beta_1, beta_2 = optimizer.betas
    power_1 = power_2 = 1.0
    for step, slopes in enumerate(rounds, 1):
        power_1, power_2 = power_1 * beta_1, power_2 * beta_2
        for index, p in enumerate(parameters):
            u = np.zeros_like(p)
            for seed, slope in zip(contributions_of(slopes, step).seeds, slopes, strict=True):
                z = Rademacher().values([DirectionKey(RUN_SEED, seed)], index, 0, p.size)[0].reshape(p.shape)
                u = np.asarray(u + f32(slope) * z.astype(f32))
            first[index] = np.asarray(first[index] * f32(beta_1) + u * f32(1 - beta_1))
            second[index] = np.asarray(second[index] * f32(beta_2) + u * u * f32(1 - beta_2))
            if p.ndim > 1:
                p *= f32(decay)
            root = np.sqrt(second[index] * f32(1 / (1 - power_2))) + f32(optimizer.epsilon)
            p -= first[index] * f32(1 / (1 - power_1)) / root * f32(rate)
    return parameters


def take(replayer: Replayer, rounds, optimizer: Adam, *, decay: float = 1.0, rate: float = 0.1, **more) -> None:
    for step, slopes in enumerate(rounds, 1):
        numbers = optimizer.numbers(step)
        contributions = contributions_of(slopes, step)
        replayer.apply(contributions, decay=decay, momentum=numbers.momentum, rate=rate, adam=numbers.adam, **more)


@given(
    shapes=SHAPES, rounds=st.lists(SLOPES, min_size=1, max_size=4), beta_1=BETAS, beta_2=BETAS,
    epsilon=st.sampled_from([1e-16, 1e-8, 0.1]), decay=st.sampled_from([1.0, 0.97]), chunk=st.integers(1, 100),
    in_pytorch=st.booleans(),
)  # fmt: skip
@settings(max_examples=150)
def test_adam_equals_the_slow_reference_bit_for_bit(
    shapes, rounds, beta_1, beta_2, epsilon, decay, chunk, in_pytorch
):  # fmt: skip
    start, optimizer = start_of(shapes), Adam((beta_1, beta_2), epsilon)
    replayer = replayer_of(start, chunk=chunk, in_pytorch=in_pytorch)
    with np.errstate(over="ignore", under="ignore"):
        take(replayer, rounds, optimizer, decay=decay, rate=0.01)
        expected = slow_adam(start, rounds, optimizer, decay=decay, rate=0.01)
    assert all(map(same_bits, replayer.trainables.tensors, expected))
    assert replayer.trainables.is_finite()


def test_threads_and_chunks_change_nothing():
    """Tensors that are large enough for PyTorch to share out among its threads."""
    start, rounds = start_of([(300, 1000), (70_001,)]), [[0.5, -2.0], [1e-3, 3.0], [1e-25, 0.0]]
    optimizer, digests, before = Adam((0.9, 0.999), 1e-8), set(), torch.get_num_threads()
    try:
        for threads, chunk, in_pytorch in ((1, 1 << 19, True), (4, 1 << 19, True), (4, 4099, True), (1, 501, False)):
            torch.set_num_threads(threads)
            replayer = replayer_of(start, chunk=chunk, in_pytorch=in_pytorch)
            take(replayer, rounds, optimizer, decay=0.9)
            digests.add(replayer.digest())
    finally:
        torch.set_num_threads(before)
    assert len(digests) == 1


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_adam_is_that_of_pytorch(decay):
    """With decoupled decay: ``torch.optim.AdamW``. Within 1e-5 after 60 steps of 0.02, at other roundings."""
    start, rate = start_of([(40, 30), (8,)]), 0.02
    rng = np.random.default_rng(1)
    rounds = rng.normal(size=(60, 3)).astype(np.float32) * rng.choice([1e-4, 1.0, 30.0], size=(60, 1))
    optimizer = Adam((0.9, 0.99), 1e-6)
    ours = replayer_of(start, in_pytorch=True)
    theirs = [torch.nn.Parameter(in_torch(values)) for values in start.values()]
    groups = [{"params": theirs[:1], "weight_decay": decay}, {"params": theirs[1:], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=rate, betas=optimizer.betas, eps=optimizer.epsilon)
    for step, slopes in enumerate(rounds, 1):
        numbers, contributions = optimizer.numbers(step), contributions_of(slopes, step)
        for parameter, gradient in zip(theirs, ours.total(contributions), strict=True):
            parameter.grad = gradient
        reference.step()
        ours.apply(
            contributions, decay=1.0 - rate * decay, momentum=numbers.momentum, rate=rate, adam=numbers.adam
        )  # fmt: skip
    for left, right, values in zip(ours.trainables.tensors, theirs, start.values(), strict=True):
        torch.testing.assert_close(left, right.detach(), rtol=0, atol=1e-5)
        assert (left - in_torch(values)).abs().max() > 0.1


def test_the_root_is_rounded_correctly_for_every_float32():
    """Mantissa and parity of the exponent decide a root: two exponents are all of them. And all subnormal numbers.

    The float64 root of a float32, rounded, is the correct one; numpy's float32 root is the machine's own instruction.
    """
    torch_arrays = TorchArrays(DEVICE)
    for exponent in (0, 127, 128):
        for first in range(0, 1 << 23, 1 << 21):
            bits = np.arange(first, first + (1 << 21), dtype=np.uint32) + np.uint32(exponent << 23)
            values = bits.view(np.float32)
            exact = np.sqrt(values.astype(np.float64))
            ours, theirs = values.copy(), in_torch(values)
            NUMPY.take_root(ours)
            torch_arrays.take_root(theirs)
            assert same_bits(ours, exact.astype(np.float32)) and same_bits(theirs, ours)
            for nearby in (np.nextafter(exact, 0), np.nextafter(exact, 4)):  # as a careless library may have it
                assert same_bits(nearby.astype(np.float32), ours)


def hash_of_then(replayer):
    """The digest that the first version would have given: without leaves, but of the same values."""
    names, reached = replayer.trainables.names, b""
    for name, tensors in {"": replayer.trainables.tensors, **replayer.buffers()}.items():
        own = hashlib.blake2b(digest_size=16)
        for label, tensor in zip(names, tensors, strict=True):
            own.update(f"{label}{tuple(tensor.shape)}".encode() + np.asarray(tensor).tobytes())
        digest = own.digest()
        reached = hashlib.blake2b(reached + digest, digest_size=16, person=BUFFERS[name]).digest() if name else digest
    return reached


@pytest.mark.parametrize(
    ("momentum", "digest"),
    [(0.0, "a3177fcf67555a61a97c35632ab3e4b9"), (0.9, "ed3749321c5c68f3691fc69b5b7f4cfa")],
)
def test_plain_and_momentum_steps_end_where_they_always_did(momentum, digest):
    """Values that the first version with this arithmetic gave, by their hash."""
    values = np.linspace(-1, 1, 35, dtype=np.float32).reshape(5, 7)
    start = {"weight": values, "bias": np.linspace(0, 3, 7, dtype=np.float32)}
    for in_pytorch in (False, True):
        replayer = replayer_of(start, in_pytorch=in_pytorch)
        for step in range(3):
            coefficients = np.array([0.01, -0.003 * step], np.float32)
            contributions = Contributions([10 * step, 10 * step + 1], coefficients, reference=0.5)
            replayer.apply(contributions, decay=0.99, momentum=momentum, rate=0.1, keep_reference=True)
        assert hash_of_then(replayer).hex() == digest


def test_a_records_numbers_name_one_step():
    assert server_step(0.0, 0.1) == PlainStep()
    assert server_step(0.9, 0.1) == MomentumStep(0.9, 0.1)
    assert server_step(0.0, 0.1, (0.99, 1e-8, 1.0, 2.0)) == AdamStep(0.0, 0.99, 1e-8, 1.0, 2.0, 0.1)
    assert Sgd(0.9).numbers(7) == (0.9, ())


@given(beta=BETAS, step=st.integers(1, 3000))
def test_corrections_make_up_for_the_zeros_at_the_start(beta, step):
    """The weights of ``step`` numbers in a running mean sum to ``1 - beta^step``."""
    momentum, (second, epsilon, first_correction, second_correction) = Adam((beta, beta), 1e-8).numbers(step)
    assert (momentum, second, epsilon) == (beta, beta, 1e-8)
    assert first_correction == second_correction
    assert first_correction == pytest.approx(1 / -np.expm1(step * np.log(beta)) if beta else 1.0, rel=1e-9)


def test_every_buffer_is_in_the_digest():
    start, optimizer = start_of([(3, 4), (2,)]), Adam((0.9, 0.999), 1e-8)
    replayer = replayer_of(start)
    take(replayer, [[1.0, 0.5], [0.1, -2.0]], optimizer, keep_reference=True)
    buffers, digest = replayer.buffers(), replayer.digest()
    assert list(buffers) == list(BUFFERS) == [*MOMENTS, "reference"]
    for name, held in buffers.items():
        before = held[1].copy()
        held[1][0] = np.nextafter(held[1][0], np.float32(9))
        assert replayer.digest() != digest, name
        held[1][...] = before
    assert replayer.digest() == digest
    without = {name: held for name, held in buffers.items() if name != "second_moment"}
    replayer.hold(without)
    assert replayer.digest() != digest
    replayer.hold(buffers)
    assert replayer.digest() == digest


def test_the_reference_is_the_estimate_and_adam_leaves_it_alone():
    replayer = replayer_of(start_of([(3, 4), (2,)]))
    take(replayer, [[1.0, 0.5]], Adam((0.9, 0.999), 1e-8), keep_reference=True)
    assert replayer.reference is not None
    assert all(map(same_bits, replayer.reference, replayer.total(contributions_of([1.0, 0.5], 1))))


def test_an_estimate_of_zero_moves_nothing():
    """Also in the first step, where the root is zero too."""
    start = start_of([(3, 4)])
    replayer = replayer_of(start)
    take(replayer, [[], [0.0]], Adam((0.9, 0.999), 1e-16))
    assert same_bits(replayer.trainables.tensors[0], start["t0"])
