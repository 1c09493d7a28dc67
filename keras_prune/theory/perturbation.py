"""How much zeroing weights changes a layer: expected for random weights, and norms that hold for any weights.

[Qian, Klabjan: A Probabilistic Approach to Neural Network Pruning, ICML 2021, arXiv:2105.10065] asks how many weights
can be zeroed before a network's output moves by more than a given error, for weights drawn independently, and bounds
the output through the spectral norms of what was removed. The formulas here are derived: the paper's constants were not
at hand. Trained weights are not independent, so `relative_error` and `largest_fraction` are a first guess for them.

The norms below (spectral, of convolutions, of pooling, slopes of activations) assume nothing about weights; with them
`lipschitz.output_bound` bounds what pruning did to the output of a network.

||.|| of a vector is its L2 norm, of a matrix its spectral norm: the most by which it multiplies the norm of a vector.
"""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Iterator, Sequence
from statistics import NormalDist

import numpy as np

SLOPES = {
    **dict.fromkeys(
        "linear relu relu6 leakyrelu elu celu prelu tanh tanhshrink softplus softsign softshrink".split(), 1.0
    ),
    **dict.fromkeys("logsigmoid hardtanh squareplus sparseplus".split(), 1.0),
    **dict.fromkeys("absolute abs fabs negative sin cos arctan arcsinh clip copy stopgradient".split(), 1.0),
    "sigmoid": 1 / 4,
    "hardsigmoid": 1 / 6,
    "sparsesigmoid": 1 / 2,
    "softmax": 1 / 2,  # v'Jv is a variance of v, at most (max - min)^2 / 4 (Popoviciu), that is at most |v|^2 / 2
    "erf": 2 / math.sqrt(math.pi),
    "silu": 1.1,
    "hardsilu": 1.5,
    "gelu": 1.1295,
    "mish": 1.0886,
    "selu": 1.7581,
}
"""The largest slope of each activation, rounded up, by its name in small letters without underscores. Of those with a
parameter, for |alpha|, |negative_slope| <= 1."""

WORK = 1e10
"""So many multiplications may be spent on the norm of one convolution; beyond that fewer frequencies are looked at."""

CHUNK = 2**20
"""So many complex numbers are held at once."""


def relative_error(fraction: float, kind: str = "random", weights: str = "uniform") -> float:
    """Expected ||change|| / ||W|| when a fraction of the weights of a large matrix W is zeroed.

    Why: both are random matrices of independent entries with mean 0; the spectral norm of one with the deviation s is
    s (sqrt(inputs) + sqrt(outputs)) up to a few percent. So it is the ratio of deviations: the root of what share of
    the sum of squares was removed.

        random, whatever the weights     sqrt(r)
        magnitude, uniform weights       r^1.5
        magnitude, Gaussian weights      sqrt(r - 2 t phi(t)), t = Phi^-1((1 + r) / 2)

    Args:
        fraction: r, share of the weights that is zeroed, from 0 to 1.
        kind: "random", or "magnitude", the smallest ones.
        weights: "uniform" around 0 or "gaussian".

    Raises:
        ValueError: an argument out of range.

    Source:
        derived from the norm of random matrices (Bai-Yin); compared with drawn matrices in the tests.

    >>> [round(relative_error(r, "magnitude", "gaussian"), 4) for r in (0.1, 0.5, 0.8)]
    [0.0229, 0.2671, 0.5918]
    >>> [round(relative_error(r), 3) for r in (0.1, 0.5, 0.8)]
    [0.316, 0.707, 0.894]
    """
    _share("relative_error", fraction=fraction)
    _kinds("relative_error", kind, weights)
    if kind == "random":
        return math.sqrt(fraction)
    if weights == "uniform":
        return float(fraction) ** 1.5
    if fraction == 1:
        return 1.0
    t = -NormalDist().inv_cdf((1 - fraction) / 2)  # the same t, with more digits near r = 1
    if t < 0.05:  # the difference below would lose its digits: 2 phi(0) (t^3 / 3 - t^5 / 10 + ...)
        return math.sqrt(2 * NormalDist().pdf(0) * (t**3 / 3 - t**5 / 10))
    return math.sqrt(fraction - 2 * t * NormalDist().pdf(t))


def largest_fraction(error: float, kind: str = "random", weights: str = "uniform") -> float:
    """The share of the weights whose removal is expected to change a matrix by this relative error.

    `relative_error` backwards: e^2, e^(2/3), or by bisection.

    Args:
        error: ||change|| / ||W||, from 0 to 1.
        kind, weights: as for `relative_error`.

    Raises:
        ValueError: an argument out of range.

    >>> [round(100 * largest_fraction(e, "magnitude"), 1) for e in (0.3, 0.1, 0.03, 0.01)]
    [44.8, 21.5, 9.7, 4.6]
    >>> [round(100 * largest_fraction(e), 2) for e in (0.3, 0.1, 0.03, 0.01)]
    [9.0, 1.0, 0.09, 0.01]
    """
    _share("largest_fraction", error=error)
    _kinds("largest_fraction", kind, weights)
    if kind == "random":
        return float(error) ** 2
    if weights == "uniform":
        return float(error) ** (2 / 3)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if relative_error(middle, kind, weights) <= error else (low, middle)
    return 1.0 if error == 1 else low


def spectral_norm(matrix: np.ndarray) -> np.ndarray:
    """The largest singular value of each matrix, in float64.

    Args:
        matrix: shape (..., rows, columns), real or complex.

    Returns:
        shape (...): of one matrix a single number.

    Raises:
        ValueError: no matrix, an empty one, or numbers that are not finite.

    >>> float(spectral_norm(np.array([[3.0, 0.0], [4.0, 0.0]])))
    5.0
    """
    m = np.asarray(matrix)
    if m.ndim < 2 or not m.size or not np.isfinite(m).all():
        raise ValueError(
            f"An array of shape {m.shape} was passed to spectral_norm; expected matrices of finite numbers, shape "
            "(..., rows, columns), none of them empty. Does the kernel hold NaN or infinite numbers?"
        )
    m = m.astype(np.complex128 if np.iscomplexobj(m) else np.float64)
    if 1 in m.shape[-2:]:
        return np.sqrt((np.abs(m) ** 2).sum((-2, -1)))
    return np.sqrt(np.maximum(np.linalg.eigvalsh(_gram(m))[..., -1], 0))


def convolution_norm(kernel: np.ndarray, lengths: Sequence[int], *, strides=1, dilation=1, groups: int = 1) -> float:
    """The norm of a circular convolution: the most by which it multiplies the norm of a picture.

    Circular means that the grid's ends meet. The Fourier transform takes such a convolution apart into one matrix per
    frequency, so its norm is the largest spectral norm of these. A stride of s folds s frequencies onto one.

    Args:
        kernel: shape (taps..., inputs / groups, outputs), one to three axes of taps.
        lengths: of the grid; each a multiple of its stride.
        strides, dilation: a number, or one for each axis.
        groups: of channels, as in Keras; as many as inputs for a depthwise convolution.

    Raises:
        ValueError: shapes that do not fit together.

    Source:
        [Sedghi, Gupta, Long: The Singular Values of Convolutional Layers, ICLR 2019], with strides.

    A moving sum of two, and every second one of them:

    >>> k = np.ones((2, 1, 1))
    >>> convolution_norm(k, (8,)), round(convolution_norm(k, (8,), strides=2), 6)
    (2.0, 1.414214)
    """
    kernel, strides, dilation = _checked("convolution_norm", kernel, lengths, strides, dilation, groups)
    if any(n % s for n, s in zip(lengths, strides)):
        raise ValueError(
            f"lengths={tuple(lengths)} was passed to convolution_norm with strides={strides}; expected multiples of "
            "the strides. For convolutions that pad with zeros use convolution_bound, which takes any lengths."
        )
    return _largest(kernel, [n // s for n, s in zip(lengths, strides)], strides, dilation, groups)


def convolution_bound(
    kernel: np.ndarray, lengths: Sequence[int | None], *, strides=1, dilation=1, groups: int = 1
) -> float:
    """A bound on the norm of a convolution that pads with zeros or not at all ("same", "valid", "causal").

    The smaller of two, each of which holds:

    * Such a convolution puts the picture on a grid larger by (taps - 1) * dilation, convolves it circularly and takes
      some of the results. Neither the first nor the last makes anything longer, so the norm of the circular one on a
      grid of this size or larger bounds it. Where that grid has too many frequencies (`WORK`) or an unknown length, a
      coarser one is looked at: the squared norm is the largest value of trigonometric polynomials of a degree m below
      taps, and such a value is at most 1 / cos(pi m / n) times the largest at n > 2m points of each axis (Ehlich,
      Zeller 1964).
    * Each result is a patch times the kernel as a matrix, and an input number is in at most
      w = prod(ceil(taps * gcd(stride, dilation) / stride)) patches: sqrt(w) times the norm of that matrix.

    Args:
        kernel, strides, dilation, groups: as for `convolution_norm`.
        lengths: of the input before padding; None where it is unknown.

    Raises:
        ValueError: shapes that do not fit together.

    >>> k = np.ones((2, 1, 1))
    >>> convolution_bound(k, (8,)), round(convolution_bound(k, (8,), strides=2), 6)
    (2.0, 1.414214)
    """
    known = [1 if n is None else n for n in lengths]
    kernel, strides, dilation = _checked("convolution_bound", kernel, known, strides, dilation, groups)
    taps, (inputs, outputs) = kernel.shape[:-2], kernel.shape[-2:]
    seen = math.prod(math.ceil(k * math.gcd(s, d) / s) for k, s, d in zip(taps, strides, dilation))
    matrix = kernel.reshape(-1, groups, outputs // groups).transpose(1, 0, 2)
    bound = math.sqrt(seen) * float(spectral_norm(matrix).max())
    tall, wide = math.prod(strides) * inputs, outputs // groups
    work = groups * min(tall, wide) ** 2 * (tall + wide)
    for points in (math.inf, 64, 32, 16, 8):
        plan = [
            _points(*axis, points) for axis in zip(taps, lengths, strides, dilation)
        ]  # (frequencies, dilation, factor) of each axis
        counts, spread, factors = zip(*plan)
        if math.prod(counts) / 2 * work <= WORK:
            return min(bound, math.sqrt(math.prod(factors)) * _largest(kernel, counts, strides, spread, groups))
    return bound


def _points(taps: int, length: int | None, stride: int, dilation: int, most: float) -> tuple[float, int, float]:
    """(how many frequencies of one axis are looked at, dilation, what the squared norm is multiplied by for that)."""
    if stride == 1 and (length is None or length + (taps - 1) * dilation > most):
        dilation = 1  # it only repeats the same matrices at other frequencies
    reach = (taps - 1) * dilation
    degree = reach // stride
    if not degree:  # the same for all frequencies
        return 1, dilation, 1.0
    exact = math.inf if length is None else math.ceil((length + reach) / stride)
    if exact <= most or most <= 2 * degree:
        return exact, dilation, 1.0
    return int(most), dilation, 1 / math.cos(math.pi * degree / most)


def pooling_norm(windows: Sequence[Sequence[tuple[int, int]]], kind: str) -> float:
    """The most by which pooling multiplies the norm of a picture, or of a change of it.

    Max pooling: a result moves by no more than the norm of the change of its window, and each number is in no more
    windows than c: sqrt(c). Average pooling: the shares 1 / size sum to 1 in each window; with the sums over the
    windows that a number is in, at most c, the norm is at most sqrt(1 * c) (Schur's test).

    Args:
        windows: of each axis (start, stop) of each window, without padding.
        kind: "max" or "average".

    Raises:
        ValueError: another kind.

    Windows of 2 side by side in two dimensions:

    >>> side = [(0, 2), (2, 4)]
    >>> pooling_norm([side, side], "max"), pooling_norm([side, side], "average")
    (1.0, 0.5)
    """
    if kind not in ("max", "average"):
        raise ValueError(f"kind={kind!r} was passed to pooling_norm; expected 'max' or 'average'.")
    total = 1.0
    for axis in windows:
        sums = np.zeros(max(stop for _, stop in axis))
        for start, stop in axis:
            sums[start:stop] += 1 if kind == "max" else 1 / (stop - start)
        total *= sums.max()
    return math.sqrt(total)


def _gram(m: np.ndarray) -> np.ndarray:
    """The smaller of m m' and m' m, for each matrix."""
    across = m.conj().swapaxes(-1, -2)
    return m @ across if m.shape[-2] < m.shape[-1] else across @ m


def _largest(kernel, counts: Sequence[int], strides, dilation, groups: int) -> float:
    """The largest norm over so many frequencies of each axis."""
    best = 0.0
    for matrices in _at_frequencies(kernel, counts, strides, dilation, groups):
        if 1 in matrices.shape[-2:]:
            best = max(best, float(spectral_norm(matrices).max()))
            continue
        grams = _gram(matrices)
        bounds = np.sqrt(np.linalg.norm(grams, axis=(-2, -1)))  # of each norm, and cheap
        for first, last in ((0, 1), (1, None)):  # after the most promising one most others need no look
            order = np.argsort(-bounds)[first:last]
            order = order[bounds[order] > best]
            if len(order):
                best = max(best, math.sqrt(max(np.linalg.eigvalsh(grams[order])[:, -1].max(), 0)))
    return best


def _at_frequencies(kernel, counts, strides, dilation, groups) -> Iterator[np.ndarray]:
    """The matrix of each frequency and group, (many, folded frequencies * inputs, outputs), some at a time.

    A real kernel's matrices at opposite frequencies are conjugate, so half of the last axis is enough.
    """
    taps, (inputs, outputs) = kernel.shape[:-2], kernel.shape[-2:]
    flat = kernel.reshape(math.prod(taps), -1)
    folded = math.prod(strides)
    grid = [*counts[:-1], counts[-1] // 2 + 1]
    waves = []
    for k, n, s, d in zip(taps, counts, strides, dilation):  # (frequencies, folded, taps)
        turns = (np.arange(n)[:, None] / n + np.arange(s)) / s
        waves.append(np.exp(-2j * np.pi * turns[..., None] * d * np.arange(k)))
    step = max(1, CHUNK // (folded * max(flat.shape)))
    for start in range(0, math.prod(grid), step):
        at = np.unravel_index(np.arange(start, min(start + step, math.prod(grid))), grid)
        phases = np.ones((len(at[0]), 1, 1))
        for wave, where in zip(waves, at):
            phases = np.einsum("fat,fbu->fabtu", phases, wave[where]).reshape(
                len(where), phases.shape[1] * wave.shape[1], -1
            )
        found = phases @ flat / math.sqrt(folded)
        found = found.reshape(len(at[0]), folded * inputs, groups, outputs // groups).transpose(0, 2, 1, 3)
        yield found.reshape(-1, *found.shape[2:])


def _checked(function: str, kernel, lengths, strides, dilation, groups) -> tuple:
    kernel = np.asarray(kernel, np.float64)
    rank = kernel.ndim - 2
    whole = [
        (value,) * rank if isinstance(value, numbers.Integral) else tuple(value)
        for value in (lengths, strides, dilation, groups)
    ]
    if not 1 <= rank <= 3 or any(len(w) != rank for w in whole) or any(v < 1 for v in itertools.chain(*whole)):
        raise ValueError(
            f"A kernel of shape {kernel.shape}, lengths={lengths}, strides={strides}, dilation={dilation} and "
            f"groups={groups} were passed to {function}; expected a kernel of shape (taps..., inputs / groups, "
            "outputs), and a whole number from 1 up for each of its one to three axes of taps."
        )
    if kernel.shape[-1] % groups or not np.isfinite(kernel).all():
        raise ValueError(
            f"A kernel of shape {kernel.shape} and groups={groups} were passed to {function}; expected finite numbers, "
            "and outputs that can be shared out to the groups."
        )
    return kernel, whole[1], whole[2]


def _share(function: str, **given) -> None:
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value <= 1:
            raise ValueError(f"{name}={value!r} was passed to {function}; expected a number from 0 to 1.")


def _kinds(function: str, kind: str, weights: str) -> None:
    if kind not in ("random", "magnitude") or weights not in ("uniform", "gaussian"):
        raise ValueError(
            f"kind={kind!r}, weights={weights!r} were passed to {function}; expected kind 'random' or 'magnitude' and "
            "weights 'uniform' or 'gaussian'."
        )
