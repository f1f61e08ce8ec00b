"""The multilayer perceptron with BatchNorm: small enough to train anywhere, and hurt most by small batches."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn


def mlp(num_inputs: int, hidden_sizes: Sequence[int], num_classes: int, bn_momentum: float) -> nn.Sequential:
    """Linear, BatchNorm, ReLU for each hidden size, then a linear layer to the classes.

    Shape: ``(N, *)`` with ``num_inputs`` values per sample ``-> (N, num_classes)`` logits.
    The hidden linear layers have no bias: BatchNorm subtracts it again (Ioffe and Szegedy 2015, section 3.2).
    """
    layers: dict[str, nn.Module] = {"flatten": nn.Flatten()}
    for number, size in enumerate(hidden_sizes, start=1):
        layers[f"linear{number}"] = nn.Linear(num_inputs, size, bias=False)
        layers[f"norm{number}"] = nn.BatchNorm1d(size, momentum=bn_momentum)
        layers[f"relu{number}"] = nn.ReLU()
        num_inputs = size
    layers["classes"] = nn.Linear(num_inputs, num_classes)
    return nn.Sequential(OrderedDict(layers))
