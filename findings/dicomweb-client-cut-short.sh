#!/usr/bin/env bash
# Claim: dicomweb-client hands out an instance whose answer was cut short, and a body without the closing delimiter of multipart
#   (RFC 2046 section 5.1.1) is no error. It does so if the answer has no length and ends with the connection, as behind some proxies.
# Versions: dicomweb-client 0.61.2, requests 2.34.2, pydicom 3.0.2, Python 3.11.
# Why it matters: HTTP can't tell such an answer from a whole one, and pydicom reads the short pixels without an error. Who stores what
#   retrieve_instance returns stores half an image. Whoever fetches must look for the delimiter.
# Seen: of 20,000 bytes of pixels 10,000 arrive, without an exception.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check dicomweb-client==0.61.2 requests==2.34.2 pydicom==3.0.2
"$folder/venv/bin/python" - <<'PYTHON'
import io
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

from dicomweb_client import DICOMwebClient
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset

image = Dataset()
image.SOPClassUID, image.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
image.Rows, image.Columns, image.SamplesPerPixel, image.PixelRepresentation = 100, 200, 1, 0
image.PhotometricInterpretation = "MONOCHROME2"
image.BitsAllocated, image.BitsStored, image.HighBit = 8, 8, 7
image.PixelData = bytes(20_000)
image["PixelData"].VR = "OB"
image.file_meta = FileMetaDataset()
image.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
file = io.BytesIO()
image.save_as(file, enforce_file_format=True)


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", 'multipart/related; type="application/dicom"; boundary=b')
        self.end_headers()
        head = b"--b\r\nContent-Type: application/dicom\r\n\r\n"
        self.wfile.write(head + file.getvalue()[:-10_000])


server = HTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = DICOMwebClient(f"http://127.0.0.1:{server.server_port}")
found = client.retrieve_instance("1.2", "1.2.1", "1.2.3")
print(f"pixels: {len(image.PixelData):,} bytes stored, {len(found.PixelData):,} arrived")
assert len(found.PixelData) == 10_000
PYTHON
