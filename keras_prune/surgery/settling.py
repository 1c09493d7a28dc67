"""Settle: PSP layers become the plain layers they have learned to be."""

from __future__ import annotations

import keras

from keras_prune.internals import layers_of
from keras_prune.layers import PLAIN, PSPLayer
from keras_prune.surgery.rebuilding import Rebuild


def psp_layers(model: keras.Model) -> list[PSPLayer]:
    """The PSP layers of a model, at any depth, each once."""
    return list({id(layer): layer for layer in layers_of(model) if type(layer) in PLAIN}.values())


def settle(model: keras.Model) -> keras.Model:
    """A plain model with the same outputs: kernel <- w * nu, bit for bit what the PSP layers multiply with.

    Pruned structures are zeros in its kernels; nothing is removed yet (`strip` settles first and then removes).

    Args:
        model: a built Functional or Sequential model. It is not changed.

    Returns:
        A new model without alphas, compiled like the original with a fresh optimizer: momenta of w say little about
        w * nu. A model without PSP layers comes back as it is.
    """
    return _Settle(model).model() if psp_layers(model) else model


def structures_left(model: keras.Model) -> dict[str, dict[str, tuple[int, int]]]:
    """PSP layer -> structure -> (how many it has, how many are not pruned)."""
    return {
        layer.name: {structure: (left.size, int(left.sum())) for structure, left in layer.alive().items()}
        for layer in psp_layers(model)
    }


class _Settle(Rebuild):
    def made(self, old, config):
        if type(old) in PLAIN:
            return super().made(old, old.plain_config(), PLAIN[type(old)])
        return super().made(old, config)

    def copy_weights(self, old, new):
        if type(old) not in PLAIN:
            return super().copy_weights(old, new)
        for name in old._kernels:
            kernel = getattr(new, name)
            kernel.assign(keras.ops.cast(old.effective_kernel(name), kernel.dtype))
            self.variables[id(old.raw_kernel(name))] = kernel
        if old.use_bias:
            new.bias.assign(old.bias)
            self.variables[id(old.bias)] = new.bias
        for before, after in self.sublayers(old, new):  # a layer given as activation
            self.copy_weights(before, after)
