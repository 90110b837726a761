#!/usr/bin/env bash
# Claim: FAISS chooses how an HNSW search marks visited vectors by hnsw.use_visited_hashset. Python shows the attribute, but
#   can neither read nor set it: it is a C++ optional, for which the bindings have no conversion.
# Versions: faiss-cpu 1.15.1, numpy 2.4.6, Python 3.11.
# Why it matters: a hash set or a byte for each of a million vectors is a good part of a short search's time and of its
#   memory. Tuning it from Python looks possible and isn't: reading gives an opaque object that is true for any value.
# Seen: the attribute is a "Swig Object of type 'std::optional< bool > *'", true for any value. True, False and None raise
#   TypeError. Only what was read can be put back.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check faiss-cpu==1.15.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import faiss

index = faiss.IndexHNSWFlat(8, 16)
value = index.hnsw.use_visited_hashset
print(type(value).__name__, repr(value).split(" at ")[0])
assert "optional< bool >" in repr(value) and bool(value)
for wanted in (True, False, None, value):
    try:
        index.hnsw.use_visited_hashset = wanted
        is_taken = True
    except TypeError as error:
        is_taken = False
        print(f"{wanted}: {error}")
    assert is_taken == (wanted is value)
PYTHON
