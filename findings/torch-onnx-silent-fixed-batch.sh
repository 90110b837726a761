#!/usr/bin/env bash
# Claim: torch.onnx.export(dynamo=True) drops a requested dynamic batch without an error or a warning if the network calls len()
#   on a tensor. The graph's batch is then that of the example. torch.export.export raises an error for the same network.
#   x.shape[0] in place of len(x) keeps the batch dynamic.
# Versions: torch 2.13.0, onnxscript 0.7.2, onnx 1.23.2.
# Why it matters: vision transformers often expand a class token by len(x). Their files then take one batch size only.
# Seen: "len: 2, torch.export.export: UserError" and "shape: batch, torch.export.export: fine".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 numpy
"$folder/venv/bin/python" -W ignore - 2>"$folder/errors" <<'PY' | tee "$folder/out"
import torch
from torch import nn


class Tokens(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.count = count
        self.token = nn.Parameter(torch.zeros(1, 1, 3))

    def forward(self, x):
        return torch.cat([self.token.expand(self.count(x), -1, -1), x], 1)[:, 0]


shapes = ({0: torch.export.Dim("batch")},)
example = (torch.zeros(2, 4, 3),)
for name, count in (("len", len), ("shape", lambda x: x.shape[0])):
    network = Tokens(count).eval()
    program = torch.onnx.export(network, example, dynamic_shapes=shapes, dynamo=True, verbose=False)
    try:
        torch.export.export(network, example, dynamic_shapes=shapes)
        strict = "fine"
    except Exception as error:
        strict = type(error).__name__
    print(f"{name}: {program.model.graph.inputs[0].shape[0]}, torch.export.export: {strict}")
PY
diff "$folder/out" - <<'EXPECTED'
len: 2, torch.export.export: UserError
shape: batch, torch.export.export: fine
EXPECTED
