#!/usr/bin/env bash
# anomalib's feature extractor gives layers that are not in the network's order each other's names.
#
# Version: anomalib 2.7.0, timm 1.0.31, torch 2.14.1, torchvision 0.29.1.
# Behaviour: TimmFeatureExtractor("resnet18", ["layer3", "layer2"]) returns what layer2 made under the name
#   "layer3", and the reverse. `out_dims` goes by the request, so that it says 256 channels of a tensor
#   that has 128. No error, no warning. In the order of the network all agree.
# Where two meet: timm's features_only gives features in the network's order, whatever the order of
#   out_indices; anomalib pairs them with the names as they were asked for.
# Why it matters: in PatchCore the first of `layers` gives the patches, so who puts the coarser layer
#   first for a bank a quarter as long gets the long one, and a table of layers tells the wrong ones.
# Seen: the lines that this script prints, and compares.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet \
    anomalib==2.7.0 timm==1.0.31 torch==2.14.1 torchvision==0.29.1
cat > "$folder/run.py" <<'PYTHON'
import timm
import torch
from anomalib.models.components.feature_extractors import TimmFeatureExtractor

picture = torch.rand(1, 3, 64, 64)
found = {}
for layers in (["layer2", "layer3"], ["layer3", "layer2"]):
    extractor = TimmFeatureExtractor(backbone="resnet18", layers=layers, pre_trained=False).eval()
    with torch.no_grad():
        shapes = {name: tuple(one.shape) for name, one in extractor(picture).items()}
    print("asked for", layers, "got", shapes, "out_dims", extractor.out_dims)
    found[layers[0]] = shapes, extractor.out_dims

fine, coarse = (1, 128, 8, 8), (1, 256, 4, 4)
network = timm.create_model("resnet18", pretrained=False).eval()
with torch.no_grad():
    made = network.layer2(network.layer1(network.maxpool(network.act1(network.bn1(network.conv1(picture))))))
assert tuple(made.shape) == fine  # so this is what layer2 makes
assert found["layer2"] == ({"layer2": fine, "layer3": coarse}, [128, 256])
assert found["layer3"] == ({"layer3": fine, "layer2": coarse}, [256, 128])
print("as described")
PYTHON
"$folder/venv/bin/python" "$folder/run.py"
