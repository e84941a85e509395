#!/usr/bin/env bash
# OpenCV takes a NumPy array of the other byte order for one of this machine's, and raises nothing.
#
# Version: opencv-python-headless 5.0.0.93, Pillow 13.0.0, numpy 2.4.6, on a little-endian CPU.
# Behaviour: every function that takes an array reads its bytes, not its dtype: of [[1, 2], [3, 4]] in
#   ">u2" the mean is 640, and what is flipped, turned or resized holds 256, 512, 768, 1024 and says
#   that it is uint16. The same with ">i4" and ">f4". No error, no warning. NumPy itself is right.
# Where two meet: Pillow opens a 16-bit grey TIFF that was written big-endian ("MM") in the mode "I;16B",
#   and numpy.asarray of that has the dtype ">u2". So numpy.asarray(PIL.Image.open(path)), given to
#   OpenCV, is noise, while NumPy shows the right numbers.
# Why it matters: a picture of other pixels gets a verdict.
# Seen: the lines that this script prints, and compares.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet \
    opencv-python-headless==5.0.0.93 pillow==13.0.0 numpy==2.4.6
cat > "$folder/run.py" <<'PYTHON'
import io
import struct
import sys

import cv2
import numpy as np
from PIL import Image

assert sys.byteorder == "little"
plain = np.array([[1, 2], [3, 4]], np.uint16)
swapped = plain.astype(">u2")
assert (swapped == plain).all()
assert swapped.mean() == 2.5

print("opencv", cv2.__version__, "numpy", np.__version__)
ways = {
    "flip": lambda a: cv2.flip(a, 1),
    "rotate": lambda a: cv2.rotate(a, cv2.ROTATE_180),
    "resize": lambda a: cv2.resize(a, (4, 4), interpolation=cv2.INTER_NEAREST),
}
for name, way in ways.items():
    right, wrong = way(plain), way(swapped)
    print(name, "of", swapped.dtype, "gives", sorted(set(wrong.ravel().tolist())), wrong.dtype)
    assert wrong.dtype == np.uint16
    assert (wrong == right.byteswap()).all()
for kind in (">i4", ">f4"):
    assert (cv2.flip(plain.astype(kind), 1) != cv2.flip(plain.astype(kind[1:]), 1)).all(), kind
mean = cv2.mean(swapped)[0]
print("mean of", swapped.dtype, "is", mean)
assert mean == 640

# A baseline TIFF of 2 x 2 pixels, 16-bit grey, big-endian: one strip behind the directory.
entries = [(256, 3, 1, 2), (257, 3, 1, 2), (258, 3, 1, 16), (259, 3, 1, 1), (262, 3, 1, 1),
           (273, 4, 1, 122), (277, 3, 1, 1), (278, 3, 1, 2), (279, 4, 1, 8)]
directory = struct.pack(">H", len(entries))
for tag, kind, count, value in entries:
    directory += struct.pack(">HHI", tag, kind, count)
    directory += struct.pack(">HH", value, 0) if kind == 3 else struct.pack(">I", value)
tiff = b"MM\0*" + struct.pack(">I", 8) + directory + struct.pack(">I", 0)
assert len(tiff) == 122
picture = Image.open(io.BytesIO(tiff + swapped.tobytes()))
pixels = np.asarray(picture)
print("Pillow", picture.mode, pixels.dtype, pixels.tolist())
assert (pixels == plain).all()
turned = cv2.rotate(pixels, cv2.ROTATE_180)
print("and turned by OpenCV:", turned.tolist())
assert (turned == plain[::-1, ::-1].byteswap()).all()
print("as described")
PYTHON
"$folder/venv/bin/python" "$folder/run.py"
