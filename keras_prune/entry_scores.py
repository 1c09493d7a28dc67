"""What single entries of kernels are worth: scores that look further than |w|, most of them measured on data.

All are shaped like the kernel; higher = keep.
"""

from __future__ import annotations

from itertools import islice

import numpy as np

from keras_prune.channels import Channels
from keras_prune.probes import batches, gradient_times_weight, unlabelled
from keras_prune.program import Program
from keras_prune.sensitivity import inverse_of, pieces, refuse_infinite, shown
from keras_prune.sites import Site, sites_of

MEASURED = ("snip", "sipp", "links")
"""Kinds that need data."""

PER_NEURON = ("sipp", "links")
"""Those whose scores are shares of what a neuron adds up."""

BATCHES = 16
"""So many batches of labelled data are looked at."""

BATCH_SIZE = 64

MEMORY = 2**27
"""Bytes for what is computed beside the network's own values of one batch."""


def lamp(values: np.ndarray) -> np.ndarray:
    """w^2 / the sum of the squares of all weights of the kernel that are at least as large, in (0, 1].

    [Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021, arXiv:2010.07611] Of equal ones the
    later is the larger, so that exactly one entry has 1: the one that must stay.

    >>> lamp(np.array([1.0, -2.0, 0.0, 2.0])).round(3).tolist()
    [0.111, 0.5, 0.0, 1.0]
    """
    squares = values.ravel().astype(np.float64) ** 2
    order = np.argsort(squares, kind="stable")[::-1]
    sums = np.cumsum(squares[order])
    scores = np.zeros(squares.size)
    np.divide(squares[order], sums, out=sums, where=sums > 0)
    scores[order] = sums
    return scores.reshape(values.shape)


def taken(kind: str, channels: Channels, data):
    """The data that a kind measures on, as arrays or batches that can be read again.

    Raises:
        ValueError: it does not fit the model, is empty, or for "snip" has no labels.
    """
    if kind != "snip":
        return unlabelled(channels.model, data)
    found = list(islice(batches(data), BATCHES))
    if not found:
        raise ValueError("data holds no batch; kind='snip' expects data=(x, y), or an iterable of (x, y) batches.")
    return found


def measurable(kind: str, channels: Channels) -> set[int]:
    """Ids of the variables that a kind can score: those with a gradient, or those with a view as a matrix."""
    if kind == "snip":
        return {id(v) for v in channels.model.trainable_variables}
    return {id(site.kernel) for site in _sites(channels)}


def measured(kind: str, channels: Channels, data) -> dict[int, np.ndarray]:
    """Scores by id of the kernel, on what `taken` made of the data, with the weights as they are now.

    Raises:
        ValueError: the model has no loss ("snip"), or what it makes of the data is not finite.
    """
    if kind == "snip":
        return snip(channels, data)
    sites = _sites(channels)
    found = (sipp if kind == "sipp" else links)(sites, Program(channels.model), data)
    return {id(site.kernel): site.view.kernel(scores) for site, scores in zip(sites, found)}


def snip(channels: Channels, data) -> dict[int, np.ndarray]:
    """|mean over the batches of gradient x weight|, by id of the variable.

    [Lee, Ajanthan, Torr, SNIP, ICLR 2019, arXiv:1810.02340, eq. 6; without the normalisation, which changes no order]
    """
    shadows = gradient_times_weight(channels, data, max_batches=BATCHES)
    found = {key: np.abs(np.mean([s[key] for s in shadows], axis=0, dtype=np.float64)) for key in shadows[0]}
    if not all(np.isfinite(scores).all() for scores in found.values()):
        raise ValueError("kind='snip' found NaN or infinite gradients on this data: is it what it should be?")
    return found


def sipp(sites: list[Site], program: Program, data) -> list[np.ndarray]:
    """Empirical sensitivity of each weight as matrices, (blocks, columns, outputs), in [0, 1].

    The share of a weight's product in the sum of its neuron, split by the signs of weights and inputs; its mean over
    the positions of a sample, and of these the largest over the samples and signs.

    [Baykal, Liebenwein, Gilitschenski, Feldman, Rus: SiPPing Neural Networks, arXiv:1910.05422; the deterministic form,
    reduced as in the authors' code]
    """
    largest = [np.zeros(site.shape, np.float32) for site in sites]
    for number, x in shown(sites, program, data, BATCH_SIZE):
        site = sites[number]
        for sample in np.split(x, len(x)):
            sums = np.zeros((2, *site.shape), np.float32)
            for block, sign, first, rows, weights in pieces(site, sample, MEMORY):
                shares = weights * (rows.T @ inverse_of(site, rows, weights))
                plus, minus = np.split(shares, 2, axis=1)  # a weight has one sign: its share as the other is 0
                sums[sign, block, :, first : first + plus.shape[1]] += plus + minus
            np.maximum(largest[number], sums.max(0) / site.view.count(sample.shape), out=largest[number])
    return [np.minimum(shares, 1.0) for shares in largest]  # rounding may lift a share of everything


def links(sites: list[Site], program: Program, data) -> list[np.ndarray]:
    """Share of each link j -> i in its neuron, c_ji = |w_ji| mean |a_j|, divided by the sum over j, as matrices.

    The mean is over samples and positions. A reconstruction of the third phase of [Riera, Arnau, Gonzalez,
    (Pen-)Ultimate DNN Pruning, arXiv:1906.02535], whose text was not at hand.
    """
    sums, counts = [np.zeros(site.shape[:2]) for site in sites], [0] * len(sites)
    for number, x in shown(sites, program, data, BATCH_SIZE):
        site = sites[number]
        count, step = site.view.count(x.shape), max(1, MEMORY // (32 * site.shape[0] * site.shape[1]))
        for start in range(0, count, step):
            rows = site.view.rows(x, np.arange(start, min(start + step, count)))
            sums[number] += np.abs(rows).sum(axis=1, dtype=np.float64)
        refuse_infinite(site, sums[number])
        counts[number] += count
    found = []
    for site, total, count in zip(sites, sums, counts):
        strength = np.abs(site.matrix().astype(np.float64)) * (total / count)[:, :, None]
        whole = strength.sum(axis=1, keepdims=True)
        found.append(np.divide(strength, whole, out=np.zeros_like(strength), where=whole > 0))
    return found


def links_of_neurons(channels: Channels) -> dict[int, np.ndarray]:
    """By id of the kernel: the flat places of each neuron's links, shape (neurons, links)."""
    found = {}
    for site in _sites(channels):
        shape = tuple(site.kernel.shape)
        places = site.view.matrices(np.arange(np.prod(shape)).reshape(shape))
        found[id(site.kernel)] = places.transpose(0, 2, 1).reshape(-1, places.shape[1])
    return found


def _sites(channels: Channels) -> list[Site]:
    return sites_of(channels, Program(channels.model))
