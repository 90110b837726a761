#!/usr/bin/env bash
# Claim: dicomweb-client sends the header Host without the port, also if the service is on another port than 80 and 443.
# Versions: dicomweb-client 0.61.2, requests 2.34.2, Python 3.11.
# Why it matters: RFC 9110 section 7.2 wants the port there. PACS are mostly on ports of their own (8042, 8080), behind proxies that choose a
#   service by Host, and build the addresses of what they answer (RetrieveURL, BulkDataURI) from it: these lead to the wrong port. requests
#   by itself sends the port. A caller's session has to take the header out again.
# Seen: Host is 127.0.0.1 by dicomweb-client, and 127.0.0.1:PORT by requests.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check dicomweb-client==0.61.2 requests==2.34.2
"$folder/venv/bin/python" - <<'PYTHON'
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import requests
from dicomweb_client import DICOMwebClient

hosts = []


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        hosts.append(self.headers["Host"])
        body = b"[]"
        self.send_response(200)
        self.send_header("Content-Type", "application/dicom+json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


server = HTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
port = server.server_port
DICOMwebClient(f"http://127.0.0.1:{port}").search_for_studies()
requests.get(f"http://127.0.0.1:{port}/studies", timeout=10)
print("Host by dicomweb-client and by requests:", [host.replace(str(port), "PORT") for host in hosts])
assert hosts == ["127.0.0.1", f"127.0.0.1:{port}"]
PYTHON
