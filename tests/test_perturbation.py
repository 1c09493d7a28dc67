"""Perturbed weights: formulas against drawn matrices, norms against matrices written out, slopes on a fine grid."""

import itertools
import math

import keras
import numpy as np
import pytest

from keras_prune import theory
from keras_prune.theory import perturbation


@pytest.mark.parametrize("fraction, error", [(0.1, 0.0229), (0.5, 0.2671), (0.8, 0.5918)])
def test_relative_errors_have_their_worked_values(fraction, error):
    assert theory.relative_error(fraction, "magnitude", "gaussian") == pytest.approx(error, abs=5e-5)
    assert theory.relative_error(fraction, "magnitude") == fraction**1.5
    assert theory.relative_error(fraction) == theory.relative_error(fraction, "random", "gaussian") == fraction**0.5


@pytest.mark.parametrize(
    "error, random, magnitude", [(0.3, 9, 44.8), (0.1, 1, 21.5), (0.03, 0.09, 9.7), (0.01, 0.01, 4.6)]
)
def test_largest_fractions_have_their_worked_values(error, random, magnitude):
    assert 100 * theory.largest_fraction(error) == pytest.approx(random, rel=1e-9)
    assert 100 * theory.largest_fraction(error, "magnitude") == pytest.approx(magnitude, abs=0.06)


def drawn(weights, size, seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=size) if weights == "gaussian" else rng.uniform(-1, 1, size)


@pytest.mark.parametrize("size", [(512, 512), (512, 768)])
@pytest.mark.parametrize("kind, weights", list(itertools.product(("random", "magnitude"), ("uniform", "gaussian"))))
def test_drawn_matrices_change_as_predicted(kind, weights, size):
    w, rng = drawn(weights, size, 0), np.random.default_rng(1)
    whole = theory.spectral_norm(w)
    for fraction in (0.2, 0.5, 0.9):
        score = rng.random(size) if kind == "random" else np.abs(w)
        change = np.where(score <= np.quantile(score, fraction), w, 0)
        found = theory.spectral_norm(change) / whole
        assert found == pytest.approx(theory.relative_error(fraction, kind, weights), rel=0.05)
        other = "magnitude" if kind == "random" else "random"
        assert found != pytest.approx(theory.relative_error(fraction, other, weights), rel=0.05)  # the control


def test_removing_a_vanishing_share_changes_vanishingly_little_as_matrices_grow():
    """d^1.5 of d^2 weights, uniform: measured numbers of the notes this follows."""
    for d, magnitude, random in ((256, 0.01841, 0.2949), (1024, 0.00658, 0.2082)):
        norm = 2 * math.sqrt(d / 3) / math.sqrt(d)  # of entries in [-1, 1] / sqrt(d)
        assert norm * theory.relative_error(d**-0.5, "magnitude") == pytest.approx(magnitude, rel=0.05)
        assert norm * theory.relative_error(d**-0.5) == pytest.approx(random, rel=0.05)


@pytest.mark.parametrize("weights", ["uniform", "gaussian"])
def test_the_smallest_weights_change_less_than_any_and_fractions_are_the_way_back(weights):
    for kind in ("random", "magnitude"):
        errors = [theory.relative_error(r, kind, weights) for r in np.linspace(0, 1, 101)]
        assert errors[0] == 0 and errors[-1] == 1 and (np.diff(errors) > 0).all()
        for fraction in (0, 1e-9, 1e-4, 0.02, 0.03, 0.04, 0.05, 0.3, 0.99, 1):
            error = theory.relative_error(fraction, kind, weights)
            assert theory.largest_fraction(error, kind, weights) == pytest.approx(fraction, rel=1e-6, abs=1e-12)
            if 0 < fraction < 1 and kind == "magnitude":
                assert error < theory.relative_error(fraction, "random", weights)


# -- norms -------------------------------------------------------------------------------------------------------


def test_spectral_norms_are_largest_singular_values():
    rng = np.random.default_rng(0)
    for shape in ((5, 3), (3, 5), (1, 4), (4, 1), (2, 3, 4, 6), (0, 3, 2)[1:]):
        for m in (rng.normal(size=shape), rng.normal(size=shape) + 1j * rng.normal(size=shape)):
            found = theory.spectral_norm(m)
            assert found.shape == shape[:-2] and np.allclose(found, np.linalg.svd(m, compute_uv=False)[..., 0])
    assert theory.spectral_norm(np.zeros((3, 3))) == 0


def circular(kernel, lengths, strides, dilation, groups):
    """The matrix of a circular convolution, number by number."""
    taps, (inputs, outputs) = kernel.shape[:-2], kernel.shape[-2:]
    out = [n // s for n, s in zip(lengths, strides)]
    made = np.zeros((*out, outputs, *lengths, inputs * groups))
    for at in np.ndindex(*out):
        for tap in np.ndindex(*taps):
            place = tuple((a * s + t * d) % n for a, s, t, d, n in zip(at, strides, tap, dilation, lengths))
            for o in range(outputs):
                group = o // (outputs // groups)
                made[(*at, o, *place)][group * inputs : (group + 1) * inputs] += kernel[tap][:, o]
    return made.reshape(math.prod(out) * outputs, -1)


@pytest.mark.parametrize(
    "taps, lengths, strides, dilation",
    [
        ((3,), (7,), (1,), (1,)),
        ((3,), (8,), (2,), (1,)),
        ((3,), (9,), (3,), (2,)),
        ((5,), (4,), (1,), (1,)),
        ((3, 2), (5, 4), (1, 1), (1, 1)),
        ((3, 3), (6, 4), (2, 1), (1, 2)),
        ((2, 3), (6, 6), (3, 2), (2, 1)),
        ((2, 3, 2), (3, 4, 4), (1, 2, 1), (1, 1, 2)),
    ],
)
@pytest.mark.parametrize("groups", [1, 2])
def test_norms_of_circular_convolutions_are_those_of_their_matrices(taps, lengths, strides, dilation, groups):
    kernel = np.random.default_rng(0).normal(size=(*taps, 2, 4))
    found = theory.convolution_norm(kernel, lengths, strides=strides, dilation=dilation, groups=groups)
    exact = np.linalg.norm(circular(kernel, lengths, strides, dilation, groups), 2)
    assert found == pytest.approx(exact, rel=1e-9)
    if math.prod(strides) == 1:  # else taps may meet in no input: then the kernel as a matrix has the same norm
        assert found != pytest.approx(float(theory.spectral_norm(kernel.reshape(-1, 4))), rel=1e-3)


def test_frequencies_are_looked_at_in_chunks(monkeypatch):
    kernel = np.random.default_rng(0).normal(size=(3, 3, 3, 5))
    whole = theory.convolution_norm(kernel, (10, 12))
    monkeypatch.setattr(perturbation, "CHUNK", 200)
    assert theory.convolution_norm(kernel, (10, 12)) == pytest.approx(whole, rel=1e-12)


def padded(kernel, length, stride, dilation, padding):
    """The matrix of a convolution of one axis that pads with zeros."""
    taps, inputs, outputs = kernel.shape
    reach = (taps - 1) * dilation + 1
    total = {"valid": 0, "causal": reach - 1}.get(padding, max((-(-length // stride) - 1) * stride + reach - length, 0))
    before = total if padding == "causal" else total // 2
    rows = []
    for start in range(-before, length + total - before - reach + 1, stride):
        row = np.zeros((length, inputs, outputs))
        for tap in range(taps):
            if 0 <= start + tap * dilation < length:
                row[start + tap * dilation] = kernel[tap]
        rows.append(row.reshape(-1, outputs).T)
    return np.concatenate(rows)


@pytest.mark.parametrize("many", ["all", "some", "unknown"])
def test_bounds_are_no_smaller_than_norms_of_convolutions_that_pad(many, monkeypatch):
    if many == "some":
        monkeypatch.setattr(perturbation, "WORK", 100 * 2**2 * 5)  # so that of most only 8 frequencies are looked at
    plain, ratios = 0, []
    for seed, (taps, stride, dilation, padding, length) in enumerate(
        itertools.product((1, 2, 3, 5), (1, 2, 3, 5), (1, 2), ("valid", "same", "causal"), (9, 24))
    ):
        kernel = np.random.default_rng(seed).normal(size=(taps, 2, 3)) + seed % 2  # also such that add up
        exact = np.linalg.norm(padded(kernel, length, stride, dilation, padding), 2)
        lengths = (None,) if many == "unknown" else (length,)
        found = theory.convolution_bound(kernel, lengths, strides=stride, dilation=dilation)
        assert found >= exact * (1 - 1e-9), (taps, stride, dilation, padding, length)
        plain += float(theory.spectral_norm(kernel.reshape(-1, 3))) < exact * (1 - 1e-6)
        ratios.append(found / exact)
    assert plain > 50  # the kernel as a matrix alone is no bound
    assert np.median(ratios) < 1.15 and max(ratios) < 2.3


@pytest.mark.parametrize("kind", ["max", "average"])
def test_pooling_norms_bound_and_are_reached_where_windows_do_not_overlap(kind):
    rng = np.random.default_rng(0)
    for windows in ([(0, 2), (2, 4)], [(0, 3), (1, 4), (2, 5)], [(0, 2), (1, 4), (3, 5)], [(0, 1), (0, 5)]):
        bound = theory.pooling_norm([windows], kind)
        worst = 0.0
        for x in (*rng.normal(size=(20, 5)), *np.eye(5)):
            jacobian = np.zeros((len(windows), 5))
            for row, (start, stop) in zip(jacobian, windows):
                if kind == "max":
                    row[start + np.argmax(x[start:stop])] = 1
                else:
                    row[start:stop] = 1 / (stop - start)
            worst = max(worst, np.linalg.norm(jacobian, 2))
        assert worst <= bound * (1 + 1e-12) and bound <= 1.2 * worst
        assert theory.pooling_norm([windows, [(0, 4)]], kind) == pytest.approx(bound * (1 if kind == "max" else 0.5))


FUNCTIONS = """linear relu relu6 leaky_relu elu celu tanh tanh_shrink softplus softsign soft_shrink log_sigmoid
hard_tanh squareplus sparse_plus sigmoid hard_sigmoid sparse_sigmoid silu hard_silu gelu mish selu""".split()
OPERATIONS = "absolute negative sin cos arctan arcsinh erf".split()


@pytest.mark.parametrize("name", FUNCTIONS + OPERATIONS)
def test_slopes_of_activations_are_the_largest_on_a_fine_grid(name):
    function = getattr(keras.activations if name in FUNCTIONS else keras.ops, name)
    x = np.linspace(-12, 12, 240_001)
    functions = [function] + ([lambda t: keras.activations.gelu(t, approximate=True)] if name == "gelu" else [])
    for f in functions:
        y = np.asarray(keras.ops.convert_to_numpy(f(keras.ops.convert_to_tensor(x, "float64"))), np.float64)
        steepest = np.abs(np.diff(y) / np.diff(x)).max()
        bound = theory.SLOPES[name.replace("_", "")]
        assert steepest <= bound * (1 + 1e-6)
        assert steepest > 0.99 * bound  # the control: it is no larger than it must be


def test_the_slope_of_softmax_is_a_half():
    rng = np.random.default_rng(0)
    worst = 0.0
    for logits in (*rng.normal(0, 3, (200, 5)), np.array([9.0, 9, -9, -9, -9])):
        p = np.exp(logits) / np.exp(logits).sum()
        worst = max(worst, np.linalg.norm(np.diag(p) - np.outer(p, p), 2))
    assert 0.4999 < worst <= theory.SLOPES["softmax"]


@pytest.mark.parametrize(
    "call, what",
    [
        (lambda: theory.relative_error(1.5), "fraction=1.5"),
        (lambda: theory.relative_error(0.5, "largest"), "kind='largest'"),
        (lambda: theory.relative_error(0.5, "random", "cauchy"), "weights='cauchy'"),
        (lambda: theory.largest_fraction(-0.1), "error=-0.1"),
        (lambda: theory.spectral_norm(np.ones(3)), r"shape \(3,\)"),
        (lambda: theory.spectral_norm(np.array([[np.nan]])), "NaN or infinite"),
        (lambda: theory.convolution_norm(np.ones((3, 2, 2)), (9,), strides=2), "multiples of the strides"),
        (lambda: theory.convolution_norm(np.ones((3, 2, 2)), (9, 9)), "one to three axes"),
        (lambda: theory.convolution_bound(np.ones((3, 2, 3)), (9,), groups=2), "shared out to the groups"),
        (lambda: theory.convolution_bound(np.ones((3, 2)), (), strides=1), "one to three axes"),
        (lambda: theory.pooling_norm([[(0, 1)]], "sum"), "kind='sum'"),
    ],
)
def test_arguments_out_of_range_are_named(call, what):
    with pytest.raises(ValueError, match=what):
        call()
