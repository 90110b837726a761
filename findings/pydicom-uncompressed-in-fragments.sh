#!/usr/bin/env bash
# Claim: pydicom knows the transfer syntax Encapsulated Uncompressed Explicit VR Little Endian (1.2.840.10008.1.2.1.98), calls it compressed, and
#   decodes no frame of it, although nothing in it is compressed. Of JPEG XL and Deflated Image Frame (1.2.840.10008.1.2.8.1) it does not even
#   know that they are transfer syntaxes: is_compressed, the usual question before decoding, raises ValueError instead of an answer.
# Versions: pydicom 3.0.2, numpy 2.4.6, Python 3.11.
# Why it matters: the first one is how archives store frames beyond 4 GB without loss, and a NumPy call reads it. Who asks is_compressed of any
#   valid file has to expect ValueError, or a load ends at the first file that is newer than pydicom's dictionary.
# Seen: is_compressed True and NotImplementedError; "UID is not a transfer syntax." for both others; np.frombuffer gives the frame back.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pydicom==3.0.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import io

import numpy as np
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import UID

frame = np.arange(4096, dtype=np.uint16).reshape(64, 64)
image = Dataset()
image.SOPClassUID, image.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
image.Rows, image.Columns = frame.shape
image.SamplesPerPixel, image.PixelRepresentation, image.PhotometricInterpretation = 1, 0, "MONOCHROME2"
image.BitsAllocated, image.BitsStored, image.HighBit = 16, 16, 15
image.PixelData = encapsulate([frame.tobytes()])
image["PixelData"].VR, image["PixelData"].is_undefined_length = "OB", True
image.file_meta = FileMetaDataset()
image.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.1.98")
file = io.BytesIO()
image.save_as(file, enforce_file_format=True)

read = dcmread(io.BytesIO(file.getvalue()))
syntax = read.file_meta.TransferSyntaxUID
print(f"{syntax.name}: is_compressed {syntax.is_compressed}")
assert syntax.is_compressed
try:
    read.pixel_array
    raise SystemExit("it decodes the frame now")
except NotImplementedError as error:
    print(f"pixel_array: {error}")
(data,) = generate_frames(read.PixelData, number_of_frames=1)
assert (np.frombuffer(data, "<u2").reshape(64, 64) == frame).all()
print("NumPy reads the same frame")
for number in ("1.2.840.10008.1.2.8.1", "1.2.840.10008.1.2.4.110"):
    try:
        UID(number).is_compressed
        raise SystemExit(f"it knows {number} now")
    except ValueError as error:
        print(f"{number}: is_compressed: {error}")
PYTHON
