"""Slopes against backpropagation, in any grouping, with honest counts; and the error that names its cure."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fs_fwdllm.config.registries import ESTIMATORS
from fs_fwdllm.core.direction import DIRECTIONS, DirectionKey, Rademacher, make_distribution
from fs_fwdllm.core.trainables import Trainables
from fs_fwdllm.errors import ConfigError, EstimatorError, ModelError
from fs_fwdllm.estimator import Backprop, CentralDifference, ForwardMode, OneSidedDifference, Radius, make_estimator
from fs_fwdllm.estimator.base import stack_directions
from fs_fwdllm.model.perturbation import ResidentPerturbation, StreamedPerturbation
from tests.estimator.models import ANYWHERE, KEYS, ready
from tests.laws.surface import Surface
from tests.model.tiny import tiny_config

EAGER = {"fwdllm.attention": "eager"}
MODELS = [("llama", "lora"), ("bert", "lora"), ("bert", "full"), ("gpt2", "lora"), ("albert", "bottleneck")]
KINDS = ANYWHERE


def gradient_of(it, batch_loss, **settings):
    for tensor in it.trainables.tensors:
        tensor.grad = None
    loss = Backprop(it.model, **settings).gradient(batch_loss)
    return loss, [torch.zeros_like(t) if t.grad is None else t.grad.clone() for t in it.trainables.tensors]


def length(gradient):
    return float(torch.stack([part.double().square().sum() for part in gradient]).sum().sqrt())


def products(batch_loss, gradient, keys, distribution):
    """``z . grad`` in float64."""
    stacks = list(stack_directions(batch_loss, keys, distribution))
    return sum((z.double() * g.double()).flatten(1).sum(1) for z, g in zip(stacks, gradient, strict=True)).numpy()


@pytest.mark.parametrize(("architecture", "method"), MODELS)
@pytest.mark.parametrize("direction", DIRECTIONS.names())
def test_forward_mode_is_the_gradient_times_the_direction(tmp_path, architecture, method, direction):
    """Two exact derivatives in float32: equal to 1e-5 of a slope's standard deviation, the gradient's length."""
    it = ready(tmp_path, architecture, method, **EAGER)
    batch_loss = it.loss()
    loss, gradient = gradient_of(it, batch_loss)
    expected = products(batch_loss, gradient, KEYS, make_distribution(direction))
    slopes = it.estimator(estimator="forward_mode", direction=direction).slopes(batch_loss, KEYS)
    np.testing.assert_allclose(slopes.values, expected, rtol=1e-5, atol=1e-5 * length(gradient))
    assert slopes.loss == pytest.approx(loss, rel=1e-6)
    assert np.abs(expected).max() > 0.1 * length(gradient)


@pytest.mark.parametrize(("architecture", "method"), MODELS)
def test_a_central_difference_is_close_to_the_gradient_times_the_direction(tmp_path, architecture, method):
    """Radius 1e-3: truncation about ``h^2/6 |D^3 L|``, rounding about ``2^-23 L / h``; both below three per cent."""
    it = ready(tmp_path, architecture, method, **EAGER)
    batch_loss = it.loss()
    _, gradient = gradient_of(it, batch_loss)
    expected = products(batch_loss, gradient, KEYS, make_distribution("rademacher"))
    slopes = it.estimator(estimator="central", radius=1e-3).slopes(batch_loss, KEYS).values
    np.testing.assert_allclose(slopes, expected, rtol=0, atol=0.03 * length(gradient))


@pytest.mark.parametrize(("architecture", "method"), MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_slope_is_about_the_gradient_times_the_direction(tmp_path, architecture, method, kind):
    """However it is measured; a one-sided difference is off by ``h/2 z'Hz`` besides, which radius 1e-3 keeps small."""
    it = ready(tmp_path, architecture, method, **EAGER)
    batch_loss = it.loss()
    _, gradient = gradient_of(it, batch_loss)
    expected = products(batch_loss, gradient, KEYS, make_distribution("rademacher"))
    measured = it.estimator(estimator=kind, radius=1e-3).slopes(batch_loss, KEYS)
    np.testing.assert_allclose(measured.values, expected, rtol=0, atol=0.1 * length(gradient))
    assert measured.forward_passes == ESTIMATORS[kind].passes(len(KEYS), 1)


@pytest.mark.parametrize(("architecture", "method"), MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_any_grouping_gives_the_same_slopes(tmp_path, architecture, method, kind):
    """A batched pass adds in another order: losses move by a few units in the last place, ``2^-23 L`` each."""
    it = ready(tmp_path, architecture, method, **EAGER)
    batch_loss = it.loss()
    radius = 0.01
    single = it.estimator(estimator=kind, radius=radius).slopes(batch_loss, KEYS)
    unit = 2.0**-23 * single.loss
    tolerance = 8 * unit * (1 / radius if ESTIMATORS[kind].has_radius else len(it.trainables.tensors))
    for size in (2, 3, 5, 64):
        grouped = it.estimator(estimator=kind, radius=radius, probes_per_batch=size).slopes(batch_loss, KEYS)
        np.testing.assert_allclose(grouped.values, single.values, rtol=1e-5, atol=tolerance)
        assert grouped.loss == pytest.approx(single.loss, abs=4 * unit)
    assert np.abs(single.values).min() > 3 * tolerance, "directions mixed up would be seen"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2])
def test_each_direction_is_measured_for_itself(tmp_path, kind, size):
    """A slope does not depend on its neighbours; one by one not even in its last bit."""
    it = ready(tmp_path, "bert", "lora", **EAGER)
    batch_loss = it.loss()
    estimator = it.estimator(estimator=kind, radius=0.01, probes_per_batch=size)
    forwards, backwards = (estimator.slopes(batch_loss, keys).values for keys in (KEYS, KEYS[::-1]))
    if size == 1 and not ESTIMATORS[kind].exact:  # a product of matrices may add up a row as its place has it
        assert (forwards == backwards[::-1]).all()
    np.testing.assert_allclose(forwards, backwards[::-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "size", "expected"),
    [
        *(("central", size, 10) for size in (1, 2)),
        *(("one_sided", size, 6) for size in (1, 3)),
        *(("forward_mode", size, passes) for size, passes in ((1, 10), (2, 8), (5, 6))),
    ],
)
def test_forward_passes_are_counted(tmp_path, kind, size, expected):
    """Central 2P, one-sided 1 + P; forward mode one primal pass a group and one tangent a probe."""
    it = ready(tmp_path, "bert", "lora", **EAGER)
    slopes = it.estimator(estimator=kind, probes_per_batch=size).slopes(it.loss(), KEYS)
    assert slopes.forward_passes == expected
    assert slopes.values.shape == (5,)
    assert slopes.values.dtype == np.float32


@pytest.mark.parametrize(("kind", "passes"), [("central", 10), ("one_sided", 6)])
def test_the_count_is_what_the_model_really_did(tmp_path, kind, passes):
    it = ready(tmp_path, "bert", "lora", **EAGER)
    batch_loss, calls = it.loss(), []
    it.model.base_model.model.bert.register_forward_pre_hook(lambda *_: calls.append(1))
    it.estimator(estimator=kind).slopes(batch_loss, KEYS)
    assert len(calls) == passes


def test_one_sided_reports_the_clean_loss(tmp_path):
    it = ready(tmp_path, "bert", "lora", **EAGER)
    batch_loss = it.loss()
    with torch.no_grad():
        clean = float(batch_loss.here())
    assert it.estimator(estimator="one_sided", radius=0.1).slopes(batch_loss, KEYS).loss == clean
    assert it.estimator(estimator="forward_mode").slopes(batch_loss, KEYS).loss == pytest.approx(clean, rel=1e-6)


def test_the_slope_is_divided_by_the_distance_travelled(tmp_path):
    """The parameters see the float32 radius, so the slope is divided by that and not by the decimal number.

    The two quotients differ by half a unit in the last place, so only some of many probes tell them apart.
    """
    keys = [DirectionKey(5, seed) for seed in range(64)]
    it = ready(tmp_path, "bert", "head", **EAGER)
    batch_loss, radius = it.loss(), 0.3
    perturbation = ResidentPerturbation(it.trainables, make_distribution("rademacher"))
    ends = np.array([[float(perturbation.loss(batch_loss, key, sign * radius)) for sign in (1, -1)] for key in keys])
    travelled, intended = (((ends[:, 0] - ends[:, 1]) / (2 * h)).astype(np.float32) for h in (np.float32(0.3), radius))
    slopes = CentralDifference(perturbation, radius).slopes(batch_loss, keys).values
    assert (slopes == travelled).all()
    assert (slopes != intended).any()


@pytest.mark.parametrize(("architecture", "method"), [("llama", "lora"), ("bert", "full"), ("albert", "full")])
def test_checkpointing_gives_the_same_gradient(tmp_path, architecture, method):
    it = ready(tmp_path, architecture, method)
    batch_loss = it.loss()
    loss, gradient = gradient_of(it, batch_loss)
    same_loss, same = gradient_of(it, batch_loss, gradient_checkpointing=True)
    assert loss == same_loss
    assert all(torch.equal(a, b) for a, b in zip(gradient, same, strict=True))
    assert Backprop(it.model).forward_passes == 1
    assert Backprop(it.model, gradient_checkpointing=True).forward_passes == 2


def test_checkpointing_really_runs_layers_again(tmp_path):
    it = ready(tmp_path, "bert", "full")
    batch_loss, calls = it.loss(), []
    it.model.bert.encoder.layer[0].attention.self.query.register_forward_pre_hook(lambda *_: calls.append(1))
    gradient_of(it, batch_loss)
    assert len(calls) == 1
    gradient_of(it, batch_loss, gradient_checkpointing=True)
    assert len(calls) == 3


def test_nothing_to_checkpoint():
    with pytest.raises(ModelError, match=r"fwdllm\.gradient_checkpointing: .*no stack of layers"):
        Backprop(torch.nn.Linear(2, 2), gradient_checkpointing=True)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # the fused kernel has no batching rule either
def test_fused_attention_is_named_with_its_cure(tmp_path):
    it = ready(tmp_path, "bert", "lora", **{"fwdllm.attention": "sdpa"})
    before, batch_loss = it.trainables.digest(), it.loss()
    for size in (1, 2):
        with pytest.raises(EstimatorError, match=r"fwdllm\.attention: eager") as error:
            it.estimator(estimator="forward_mode", probes_per_batch=size).slopes(batch_loss, KEYS)
        assert "attention" in str(error.value.__cause__)
    assert it.trainables.digest() == before
    assert np.isfinite(it.estimator(estimator="central", probes_per_batch=2).slopes(batch_loss, KEYS).values).all()


def test_other_errors_are_not_mistaken_for_it(tmp_path):
    it = ready(tmp_path, "bert", "lora", **EAGER)

    def break_down(module, arguments):
        raise RuntimeError("out of memory")

    it.model.base_model.model.bert.register_forward_pre_hook(break_down)
    batch_loss = it.loss()
    with pytest.raises(ModelError, match="out of memory"):
        it.estimator(estimator="forward_mode").slopes(batch_loss, KEYS)


@pytest.mark.parametrize(
    ("settings", "full", "kind", "perturbation"),
    [
        ({"estimator": "central"}, False, CentralDifference, ResidentPerturbation),
        ({"estimator": "central"}, True, CentralDifference, StreamedPerturbation),
        ({"estimator": "one_sided"}, True, OneSidedDifference, StreamedPerturbation),
        ({"estimator": "forward_mode"}, True, ForwardMode, None),
    ],
)
def test_the_configuration_chooses(tmp_path, settings, full, kind, perturbation):
    it = ready(tmp_path, "bert", "full")
    config = tiny_config("unused", "full", **{f"fwdllm.{key}": value for key, value in settings.items()}).fwdllm
    estimator = make_estimator(it.model, it.trainables, make_distribution(config.direction), config, full=full)
    assert type(estimator) is kind
    if perturbation is not None:
        assert type(estimator.perturbation) is perturbation


def test_an_unknown_direction_names_the_key():
    with pytest.raises(ConfigError, match=r"fwdllm.direction 'radmacher'.*did you mean 'rademacher'"):
        make_distribution("radmacher")


def test_a_relative_radius_follows_the_parameters() -> None:
    """``|h z| = radius |theta|``; for parameters that are all zero there is nothing to follow."""
    trainables = Trainables({"a": torch.full((3, 4), 2.0), "b": torch.full((5,), -2.0)})
    assert Radius(0.01, relative=True).at(trainables, Rademacher()) == pytest.approx(0.02)
    assert Radius(0.01).at(trainables, Rademacher()) == pytest.approx(0.01)
    with torch.no_grad():
        trainables.load_values([torch.zeros_like(tensor) for tensor in trainables.tensors])
    assert Radius(0.01, relative=True).at(trainables, Rademacher()) == pytest.approx(0.01)


def test_scaled_parameters_of_a_scaled_loss_have_the_same_relative_slopes() -> None:
    """``L(c x)``: one with an absolute radius sees another part of the surface, one with a relative radius does not."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(22, generator=generator)
    keys = [DirectionKey(3, seed) for seed in range(8)]

    def slopes(factor: float, relative: bool) -> np.ndarray:
        surface = Surface(lambda point: torch.cos(3 * point / factor).sum(), [x * factor])
        perturbation = ResidentPerturbation(surface.trainables, Rademacher())
        return factor * CentralDifference(perturbation, Radius(0.3, relative), 8).slopes(surface, keys).values

    np.testing.assert_allclose(slopes(4.0, True), slopes(1.0, True), rtol=1e-3, atol=1e-4)
    assert np.abs(slopes(4.0, False) - slopes(1.0, False)).max() > 0.1
