#!/usr/bin/env bash
# Claim: Pillow opens a TIFF of signed 8-bit samples (SampleFormat 2) as mode "L" and takes the bytes for unsigned ones,
#   without a word; and it can't open BigTIFF of big-endian byte order, whose little-endian twin it reads.
# Versions: Pillow 13.0.0, tifffile 2026.3.3, numpy 2.4.6, Python 3.11.
# Why it matters: TIFF 6.0, section 19, defines SampleFormat. Read as unsigned, -1 becomes white and 127 a mid grey:
#   a picture that looks plausible and is wrong. Microscopes and converters of medical images write both.
# Seen: samples -128, -1, 0, 127 come back as 128, 255, 0, 127. Big-endian BigTIFF: "cannot identify image file".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0 tifffile==2026.3.3 numpy==2.4.6
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys

import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError

folder = sys.argv[1]
samples = np.array([[-128, -1], [0, 127]], dtype=np.int8)
tifffile.imwrite(f"{folder}/signed.tif", samples, photometric="minisblack")
assert (tifffile.imread(f"{folder}/signed.tif") == samples).all()
with Image.open(f"{folder}/signed.tif") as image:
    read = np.asarray(image)
    print(image.mode, read.tolist())
    assert image.mode == "L" and read.tolist() == [[128, 255], [0, 127]]

grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
for order, opens in (("<", True), (">", False)):
    path = f"{folder}/big{ord(order)}.tif"
    tifffile.imwrite(path, grey, photometric="minisblack", bigtiff=True, byteorder=order)
    assert (tifffile.imread(path) == grey).all()
    try:
        with Image.open(path) as image:
            assert (np.asarray(image) == grey).all()
            print(f"BigTIFF {order}: read")
            assert opens
    except UnidentifiedImageError as error:
        print(f"BigTIFF {order}: {str(error).split(folder)[0]}")
        assert not opens
PYTHON
