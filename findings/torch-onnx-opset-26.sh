#!/usr/bin/env bash
# Claim: torch.onnx.export(dynamo=True, opset_version=26) of attention returns a file that is no valid ONNX. It states operator set
#   18 and holds Attention, an operator of set 23. There is no exception. With 25 the file is valid and states 25.
# Versions: torch 2.13.0, onnxscript 0.7.2, onnx 1.23.2. ONNX Runtime 1.31.1 takes operator sets up to 26.
# Why it matters: "the newest set that the runtime takes" is a natural choice for a vision transformer.
# Seen: "25: states 25, valid" and "26: states 18, invalid".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 numpy
"$folder/venv/bin/python" -W ignore - 2>"$folder/errors" <<'PY' | tee "$folder/out"
import logging

import onnx
import torch
import torch.nn.functional as F

logging.disable(logging.CRITICAL)


class Attention(torch.nn.Module):
    def forward(self, x):
        return F.gelu(F.scaled_dot_product_attention(x, x, x))


for asked in (25, 26):
    example = (torch.zeros(1, 2, 4, 8),)
    model = torch.onnx.export(
        Attention(), example, opset_version=asked, dynamo=True, verbose=False
    ).model_proto
    assert any(node.op_type == "Attention" for node in model.graph.node)
    try:
        onnx.checker.check_model(model)
        verdict = "valid"
    except onnx.checker.ValidationError:
        verdict = "invalid"
    print(f"{asked}: states {model.opset_import[0].version}, {verdict}")
PY
diff "$folder/out" - <<'EXPECTED'
25: states 25, valid
26: states 18, invalid
EXPECTED
