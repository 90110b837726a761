#!/usr/bin/env bash
# Claim: pydicom's apply_color_lut reads the palette of an Explicit VR Big Endian file with its bytes swapped. The tables are
#   words in the file's byte order (PS3.5 section 7.3, VR OW), and it takes them as little endian.
# Versions: pydicom 3.0.2, numpy 2.4.6, Python 3.11.
# Why it matters: pixels, numbers and descriptors of such a file are right, so that nothing hints at it, but the picture is nearly
#   black. A reader of archives has to turn the tables itself.
# Seen: entries 0, 16384, 32768, 65280 come out as such from little endian, and as 0, 64, 128, 255 from big endian.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pydicom==3.0.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import io

import numpy as np
from pydicom import dcmread, uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_color_lut

found = {}
for syntax, order in ((uid.ExplicitVRLittleEndian, "<"), (uid.ExplicitVRBigEndian, ">")):
    image = Dataset()
    image.SOPClassUID, image.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
    image.Rows, image.Columns, image.SamplesPerPixel = 1, 4, 1
    image.PhotometricInterpretation, image.PixelRepresentation = "PALETTE COLOR", 0
    image.BitsAllocated, image.BitsStored, image.HighBit = 8, 8, 7
    entries = np.array([0, 16384, 32768, 65280], f"{order}u2")
    for colour in ("Red", "Green", "Blue"):
        setattr(image, f"{colour}PaletteColorLookupTableDescriptor", [4, 0, 16])
        setattr(image, f"{colour}PaletteColorLookupTableData", entries.tobytes())
    image.PixelData = bytes([0, 1, 2, 3])
    image["PixelData"].VR = "OB"
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = syntax
    file = io.BytesIO()
    image.save_as(file, enforce_file_format=True)
    file.seek(0)
    read = dcmread(file)
    assert read.RedPaletteColorLookupTableData == entries.tobytes()
    found[order] = apply_color_lut(read.pixel_array, read)[0, :, 0].tolist()
    print(f"{syntax.name}: {found[order]}")
assert found["<"] == [0, 16384, 32768, 65280] and found[">"] == [0, 64, 128, 255]
PYTHON
