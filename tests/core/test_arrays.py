"""numpy and PyTorch give the same bits: every operation, every kind of record, every way to follow a server.

With ``FS_FWDLLM_TEST_GPU`` set, PyTorch's half is on the accelerator: what a phone rebuilds with numpy must be what a
server's GPU holds.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as drawn

from fs_fwdllm.core.arrays import LONG_ROW, NUMPY, Array, Arrays, arrays_of, flatten, squared_norm, sum_in_order
from fs_fwdllm.core.direction import (
    DIRECTIONS,
    REFERENCE_SEED,
    AimedDirections,
    DirectionKey,
    Distribution,
    Rademacher,
    make_distribution,
)
from fs_fwdllm.core.replay import BUFFERS, Contributions, Replayer, perturb
from fs_fwdllm.core.torch_arrays import TorchArrays
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.core.wire import DenseState, RoundUpdate, encode
from fs_fwdllm.data.batches import client_batches
from fs_fwdllm.data.types import Example
from fs_fwdllm.errors import DivergenceError, ModelError
from fs_fwdllm.method.replica import Replica, apply_round_update
from fs_fwdllm.model.inputs import batch_on
from tests.core.rounds import RUN_SEED, SMALLEST, random_records, random_start, replayed

DEVICE = torch.device("cuda" if os.environ.get("FS_FWDLLM_TEST_GPU") else "cpu")
TORCH = TorchArrays(DEVICE)
#: 12 federations of 15 rounds each.
FEDERATIONS, ROUNDS = 12, 15

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)
FLOAT_ARRAYS = drawn.arrays(np.float32, drawn.array_shapes(min_dims=0, max_dims=3, max_side=9), elements=FLOATS)
#: Python numbers, most of which float32 does not have.
FACTORS = st.one_of(st.floats(-3, 3), st.just(3 * SMALLEST), st.just(0.1), st.just(2.0**-126 * 0.7))


def in_torch(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.copy()).to(DEVICE)


def same_bits(ours: Array, theirs: Array) -> bool:
    ours, theirs = (np.asarray(arrays_of(values).to_numpy(values), dtype=np.float32) for values in (ours, theirs))
    return ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes()


def replicas(seed: int) -> tuple[Replayer, Replayer]:
    """The same start in numpy and in PyTorch, walked in chunks of different sizes."""
    start = random_start(seed)
    here = Trainables({name: values.copy() for name, values in start.items()})
    there = Trainables({name: in_torch(values) for name, values in start.items()})
    return Replayer(here, RUN_SEED, Rademacher(), chunk=1000), Replayer(there, RUN_SEED, Rademacher())


@given(values=FLOAT_ARRAYS, factor=FACTORS, seed=st.integers(0, 9))
def test_every_operation_rounds_alike_in_both_libraries(values, factor, seed):
    rng = np.random.default_rng(seed)
    other = np.asarray(rng.normal(size=values.shape), dtype=np.float32)
    signs = np.asarray(rng.choice([-1, 1], size=values.shape), dtype=np.int8)
    ours, theirs = values.copy(), in_torch(values)

    def step(operation, *operands):
        getattr(NUMPY, operation)(ours, *operands)
        getattr(TORCH, operation)(theirs, *(in_torch(o) if isinstance(o, np.ndarray) else o for o in operands))
        assert same_bits(ours, theirs), operation

    step("scale", factor)
    step("add", other)
    step("subtract", other)
    step("increase", factor)
    step("multiply", other)
    step("divide", np.where(other == 0, np.float32(1), other))
    NUMPY.add_scaled(ours, signs, factor, ours)
    TORCH.add_scaled(theirs, in_torch(signs), factor, theirs)
    assert same_bits(ours, theirs)
    assert same_bits(NUMPY.scaled(ours, factor), TORCH.scaled(theirs, factor))
    roots = [np.asarray(np.abs(ours)), theirs.abs()]
    NUMPY.take_root(roots[0])
    TORCH.take_root(roots[1])
    assert same_bits(*roots)
    assert bytes(NUMPY.octets(ours)) == bytes(TORCH.octets(theirs)) == ours.tobytes()
    assert NUMPY.is_finite(ours) == TORCH.is_finite(theirs) is True


@pytest.mark.parametrize("stranger", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 4, 8])
def test_one_number_out_of_range_is_found_wherever_it_stands(stranger: float, place: int) -> None:
    ours = np.linspace(-3e38, 3e38, 9, dtype=np.float32)  # whose sum is out of range on the way, and whose ends are not
    assert NUMPY.is_finite(ours) and TORCH.is_finite(in_torch(ours))
    ours[place] = stranger
    assert not NUMPY.is_finite(ours) and not TORCH.is_finite(in_torch(ours))
    for dtype in (torch.bfloat16, torch.float16):
        assert not TORCH.is_finite(in_torch(ours).to(dtype))


def test_nothing_is_finite() -> None:
    assert NUMPY.is_finite(np.zeros(0, np.float32)) and TORCH.is_finite(torch.zeros(0))


def test_each_operation_is_one_rounding_of_the_exact_result():
    """Against float64, which holds sums and products of these float32 numbers exactly (24 + 24 bits < 53).

    It does not hold quotients and roots, but they are never so near to the middle of two float32 that it matters.
    """
    rng = np.random.default_rng(0)
    values, other = (rng.normal(size=1000).astype(np.float32) for _ in range(2))
    signs, factor = rng.choice([-1, 1], size=1000).astype(np.int8), 0.1
    rounded_factor = np.float64(np.float32(factor))
    exact = values.astype(np.float64)
    for arrays, place in ((NUMPY, np.copy), (TORCH, in_torch)):
        assert same_bits(arrays.scaled(place(values), factor), (exact * rounded_factor).astype(np.float32))
        total = place(values)
        arrays.add(total, place(other))
        assert same_bits(total, (exact + other.astype(np.float64)).astype(np.float32))
        total = place(values)
        arrays.multiply(total, place(other))
        assert same_bits(total, (exact * other.astype(np.float64)).astype(np.float32))
        total = place(values)
        arrays.multiply(total, total)
        assert same_bits(total, np.square(exact).astype(np.float32))
        arrays.take_root(total)
        assert same_bits(total, np.sqrt(np.square(exact).astype(np.float32).astype(np.float64)).astype(np.float32))
        total = place(values)
        arrays.divide(total, place(other))
        assert same_bits(total, (exact / other.astype(np.float64)).astype(np.float32))
        total = place(values)
        arrays.increase(total, factor)
        assert same_bits(total, (exact + rounded_factor).astype(np.float32))
        total = place(values)
        arrays.add_scaled(total, place(signs), factor, total)
        assert same_bits(total, (exact + rounded_factor * signs).astype(np.float32))


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 1000, LONG_ROW, LONG_ROW + 1])
@pytest.mark.parametrize("count", [1, 2, 9, 300])
def test_rows_are_added_one_after_the_other(count, length):
    """Large and small numbers in turn, so that any other order of the sum gives other bits."""
    rng = np.random.default_rng(count * length)
    signs = rng.choice([-1, 1], size=(count, length)).astype(np.int8)
    factors = [float(np.float32(value)) for value in rng.normal(size=count) * 10.0 ** rng.integers(-6, 6, size=count)]
    start = rng.normal(size=length).astype(np.float32)
    expected = start.copy()
    for row, factor in zip(signs, factors, strict=True):
        expected += row * np.float32(factor)
    for arrays, place in ((NUMPY, np.copy), (TORCH, in_torch)):
        total = place(start)
        arrays.add_rows(total, place(signs), factors)
        assert same_bits(total, expected)


@pytest.mark.filterwarnings("error")
def test_a_sum_of_rows_that_leaves_the_range_says_so_by_its_values_alone():
    total = torch.zeros(20)
    TORCH.add_rows(total, in_torch(np.ones((3, 20), dtype=np.int8)), [3e38, 3e38, -3e38])
    assert not TORCH.is_finite(total)


def test_the_fast_sum_of_rows_is_the_defined_one():
    rows = np.random.default_rng(3).normal(size=(500, 333)).astype(np.float32)
    assert same_bits(sum_in_order(rows), np.add.accumulate(rows, axis=0)[-1])


def test_subnormal_numbers_are_kept():
    for arrays, place in ((NUMPY, np.copy), (TORCH, in_torch)):
        total = place(np.full(3, 5 * SMALLEST, dtype=np.float32))
        arrays.add_scaled(total, place(np.array([1, -1, 1], dtype=np.int8)), 2 * SMALLEST, total)
        assert same_bits(total, np.array([7, 3, 7], dtype=np.float64) * SMALLEST)
        arrays.scale(total, 0.5)
        assert same_bits(total, np.array([4, 2, 4], dtype=np.float64) * SMALLEST)  # 3.5 and 1.5 round to even


@given(
    start=st.integers(0, 300), count=st.integers(1, 300), rows=st.integers(1, 3), name=st.sampled_from([*DIRECTIONS])
)
def test_directions_are_the_same_in_both_libraries(start, count, rows, name):
    distribution, keys = make_distribution(name), [DirectionKey(3, seed) for seed in range(rows)]
    ours = distribution.values(keys, 2, start, count)
    theirs = distribution.values(keys, 2, start, count, TORCH)
    assert ours.shape == (rows, count) == tuple(theirs.shape)
    assert str(ours.dtype) == str(theirs.dtype).removeprefix("torch.")
    assert same_bits(ours, theirs)


def test_a_direction_along_the_reference_is_the_same_in_both_libraries():
    reference = np.random.default_rng(5).normal(size=(4, 50)).astype(np.float32)
    rows = []
    for arrays, place in ((NUMPY, np.copy), (TORCH, in_torch)):
        aimed = AimedDirections(Rademacher())
        aimed.look_along([place(reference)], 0.3)
        keys = [DirectionKey(1, 2), DirectionKey(1, REFERENCE_SEED)]
        rows.append(aimed.values(keys, 0, 17, 99, arrays))
    assert same_bits(*rows)
    assert same_bits(rows[0][1], reference.reshape(-1)[17:116] * np.float32(0.3))


def test_a_perturbed_tensor_is_the_same_in_both_libraries():
    source = np.random.default_rng(1).normal(size=(31, 17)).astype(np.float32)
    ours, theirs = np.empty_like(source), torch.empty(source.shape, device=DEVICE)
    perturb(source, ours, 1e-3, DirectionKey(1, 2), 3, Rademacher(), chunk=100)
    perturb(in_torch(source), theirs, 1e-3, DirectionKey(1, 2), 3, Rademacher())
    assert same_bits(ours, theirs) and not same_bits(ours, source)


@pytest.mark.parametrize("federation", range(FEDERATIONS))
def test_after_every_random_record_both_libraries_hold_the_same_bits(federation):
    ours, theirs = replicas(federation)
    records = random_records(federation, ROUNDS, len(ours.trainables.tensors))
    digests = list(replayed(ours, records))
    assert digests == list(replayed(theirs, records))
    assert len(set(digests)) > 1 and ours.trainables.is_finite()


def test_the_random_records_use_everything_a_record_can_say():
    """Each feature in at least a tenth of them, so that none of 180 digests is equal for want of anything to do."""
    records = [record for seed in range(FEDERATIONS) for record in random_records(seed, ROUNDS, 2)]
    assert len(records) == 180

    def share(has) -> float:
        return sum(map(bool, map(has, records))) / len(records)

    assert share(lambda record: not record.participants) > 0.1
    assert share(lambda record: len(record.values) > 10) > 0.1
    assert share(lambda record: record.decay != 1.0 and not record.momentum) > 0.1
    assert share(lambda record: record.momentum and record.decay == 1.0) > 0.1
    assert share(lambda record: record.momentum and record.decay != 1.0) > 0.1
    assert share(lambda record: record.adam and record.decay == 1.0) > 0.1
    assert share(lambda record: record.adam and record.decay != 1.0) > 0.1
    assert share(lambda record: record.step_decay) > 0.1
    assert share(lambda record: record.reference and record.keeps_reference) > 0.1
    assert share(lambda record: record.choices) > 0.1
    assert share(lambda record: 0 < np.abs(record.values).max(initial=0.0) < 2.0**-126) > 0.1


def with_digests(server: Replayer, records: list[RoundUpdate]) -> list[bytes]:
    """The frames a server sends for these steps."""
    frames = []
    for record in records:
        before = server.digest()
        apply_round_update(server, record)
        frames.append(encode(replace(record, digest_before=before, digest_after=server.digest())))
    return frames


@pytest.mark.parametrize("seed", range(4))
def test_a_numpy_client_follows_the_frames_of_a_torch_server(seed):
    client, server = replicas(seed)
    frames = with_digests(server, random_records(seed, 6, len(server.trainables.tensors)))
    replica = Replica(client)
    replica.follow(frames, server.digest())
    assert replica.digest == client.digest() == server.digest()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("numpy_serves", [False, True])
@pytest.mark.parametrize("adam", [(), (0.99, 1e-8, 2.0, 100.0)])
def test_a_late_client_takes_parameters_moments_and_reference_from_one_frame(seed, numpy_serves, adam):
    client, server = replicas(seed)
    if numpy_serves:
        client, server = server, client
    everything = dict(momentum=0.5, rate=0.1, adam=adam, keeps_reference=True)
    early, late = (
        [replace(record, **everything) for record in random_records(seed + first, 3, len(server.trainables.tensors))]
        for first in (0, 100)
    )
    with_digests(server, early)
    has = {f"has_{name}": name in server.buffers() for name in BUFFERS}
    assert has == {"has_momentum": True, "has_second_moment": bool(adam), "has_reference": True}
    values = flatten([*server.trainables.tensors, *itertools.chain(*server.buffers().values())])
    state = DenseState(3, server.digest(), **has, values=values)
    replica = Replica(client)
    replica.follow([encode(state)], server.digest())
    replica.follow(with_digests(server, late), server.digest())
    assert client.digest() == server.digest()


def test_trainables_are_the_same_object_in_both_libraries():
    start = random_start(3)
    ours = Trainables(start)
    theirs = Trainables({name: in_torch(values) for name, values in start.items()})
    assert ours.digest() == theirs.digest() == ours.clone().digest()
    assert (ours.count, ours.bytes, ours.decays()) == (theirs.count, theirs.bytes, theirs.decays())
    assert ours.to_flat().tobytes() == theirs.to_flat().tobytes()
    flat = np.broadcast_to(np.float32(0.25), ours.count)  # read-only, and no two values apart
    for trainables in (ours, theirs):
        trainables.load_flat(flat)
        assert trainables.is_finite()
        assert all(map(same_bits, trainables.split_flat(flat), trainables.tensors))
        assert not flatten(trainables.zeros_like()).any()
        with pytest.raises(DivergenceError, match="does not fit"):
            trainables.load_flat(flat[1:])
    assert ours.digest() == theirs.digest()
    assert squared_norm(ours.tensors) == squared_norm(theirs.tensors) == ours.count / 16
    ours.tensors[0][...], theirs.tensors[0][...] = np.nan, torch.nan
    assert not ours.is_finite() and not theirs.is_finite()


def test_what_moves_the_trainables_moves_the_arrays_they_were_made_of():
    start = random_start(1)
    replayer = Replayer(Trainables(start), RUN_SEED, Rademacher())
    before = {name: values.copy() for name, values in start.items()}
    replayer.apply(Contributions([1], np.ones(1, np.float32)), decay=1.0, momentum=0.0, rate=0.0)
    assert any(not same_bits(values, before[name]) for name, values in start.items())


@pytest.mark.parametrize("values", [np.zeros(3), np.zeros(3, np.float16), np.zeros((4, 4), np.float32).T[1:]])
def test_only_contiguous_float32_arrays_are_trainables(values):
    for half in (False, True):
        with pytest.raises(ModelError, match="contiguous float32"):
            Trainables({"a": values}, half=half)
    assert NUMPY.is_contiguous(np.zeros(3))
    with pytest.raises(ValueError, match="contiguous"):
        NUMPY.flat(np.zeros((4, 4), np.float32).T)


def test_numpy_arrays_cannot_be_exchanged_and_say_so():
    trainables = Trainables({"a": np.zeros(3, np.float32)})
    with pytest.raises(TypeError, match="only the parameters of a PyTorch model"), trainables.holding([np.ones(3)]):
        pass
    assert trainables.tensors[0].tolist() == [0, 0, 0]


def test_the_operations_are_those_of_what_is_given():
    assert arrays_of(np.zeros(2)) is NUMPY
    on_cpu = arrays_of(torch.zeros(2))
    assert isinstance(on_cpu, TorchArrays) and on_cpu is arrays_of(torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(TypeError, match="not a list"):
        arrays_of([1.0])


def test_parameters_that_require_a_gradient_are_moved_outside_the_graph():
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    replayer = Replayer(Trainables({"a": parameter}), 1, Rademacher())
    replayer.apply(Contributions([1], np.ones(1, np.float32)), decay=0.5, momentum=0.5, rate=1.0, keep_reference=True)
    assert parameter.grad_fn is None and parameter.is_leaf and not torch.equal(parameter, torch.ones(2, 3))
    replayer.trainables.load_values([torch.nn.Parameter(torch.zeros(2, 3))])
    assert parameter.grad_fn is None and not parameter.any()


class _Sparse(Distribution):
    """Two of three elements zero: E|z|^2 (z . e)^2 is 3 along an axis, plus d - 1."""

    name = "sparse"
    portable = False

    def values(self, keys, tensor_id: int, start: int, count: int, arrays: Arrays = NUMPY) -> Array:
        rows = [
            np.sqrt(3.0) * (np.random.default_rng([*key, tensor_id]).integers(0, 3, start + count) == 0) for key in keys
        ]
        return arrays.place(np.stack(rows)[:, start:].astype(np.float32))

    def spread(self, dimensions: int) -> float:
        return dimensions + 1.0


def test_a_distribution_is_one_class_and_one_row():
    DIRECTIONS.register("sparse", _Sparse)
    try:
        assert "sparse" in DIRECTIONS.names()
        ours, theirs = (make_distribution("sparse").values([DirectionKey(1, 2)], 0, 3, 50, a) for a in (NUMPY, TORCH))
        assert same_bits(ours, theirs)
    finally:
        DIRECTIONS.unregister("sparse")


@pytest.mark.parametrize("name", [*DIRECTIONS])
def test_the_spread_of_a_probe_is_what_its_distribution_says(name):
    """``E|g z - grad|^2 / |grad|^2`` over 40,000 directions in 6 dimensions, within five standard errors."""
    distribution, gradient = make_distribution(name), np.array([3.0, -1, 0.5, 0, 2, 1])
    z = distribution.values([DirectionKey(4, seed) for seed in range(40_000)], 0, 0, 6).astype(np.float64)
    errors = np.square((z @ gradient)[:, None] * z - gradient).sum(1) / np.square(gradient).sum()
    assert abs(errors.mean() - distribution.spread(6)) < 5 * errors.std() / len(z) ** 0.5
    assert AimedDirections(distribution).spread(6) == distribution.spread(6)


def test_the_model_is_given_the_batches_as_they_were_built():
    examples = [Example(np.arange(1, n, dtype=np.int32), np.arange(1, n, dtype=np.int32)) for n in range(2, 9)]
    batches = client_batches(examples, client=1, round_index=0, steps=3, batch_size=3, seed=1, pad_token_id=0)
    for batch in batches:
        given = batch_on("cpu", batch)
        for name in ("input_ids", "attention_mask", "labels"):
            built, tensor = getattr(batch, name), getattr(given, name)
            assert built.dtype == np.int64 and tensor.dtype == torch.int64
            assert np.array_equal(built, tensor.numpy()) and np.shares_memory(built, tensor.numpy())
        assert given.token_type_ids is None
