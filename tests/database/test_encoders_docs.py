"""docs/encoders.md: its blocks run, with small networks of random weights for the real ones."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Connection
from tests.server import pg_environment
from tests.support import encode, one
from tools.project import ROOT

torch: Any = pytest.importorskip("torch")

from tests.networks import ResNet, VisionTransformer  # noqa: E402 -- it imports torch

BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "docs/encoders.md").read_text(), re.M | re.S)
BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
# As the libraries evaluate: size of the short side, filter, size of the middle that is seen.
EVALUATED = {
    "resnet50": (232, BILINEAR, 224),
    "convnext": (256, BICUBIC, 224),
    "dinov2": (224, BICUBIC, 224),
    "clip": (224, BICUBIC, 224),
}


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put small networks where the docs import and load the real ones."""
    torch.manual_seed(0)

    def module(name: str, **members: object) -> None:
        made = ModuleType(name)
        vars(made).update(members)
        monkeypatch.setitem(sys.modules, name, made)

    def create_model(name: str, pretrained: bool, num_classes: int) -> Any:
        assert num_classes == 0
        network = ResNet((1, 1), 8)
        network.fc = torch.nn.Identity()
        return network

    resnet = ResNet((1, 1), 8)
    module("torchvision")
    module(
        "torchvision.models",
        ResNet50_Weights=SimpleNamespace(DEFAULT="learned"),
        resnet50=lambda weights: resnet,
    )
    config = {
        "input_size": (3, 224, 224),
        "crop_pct": 0.875,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "interpolation": "bicubic",
    }
    data = SimpleNamespace(resolve_model_data_config=lambda network: config)
    module("timm", create_model=create_model, data=data)
    tower: Any = VisionTransformer(64, 2, 4, patch_size=32, size=224, quick=True, projection=48)
    tower.image_mean, tower.image_std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    module("open_clip", create_model=lambda name, pretrained: SimpleNamespace(visual=tower))
    dinov2 = VisionTransformer(64, 2, 4, patch_size=14, size=518)
    monkeypatch.setattr(torch.hub, "load", lambda repository, name: dinov2)


@pytest.mark.law(8)
def test_blocks(
    libraries: None,
    db: Connection,
    dsn: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    photograph = Image.fromarray(noise).resize((467, 300))
    file = encode(np.asarray(photograph))
    environment = os.environ | pg_environment(dsn)
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    names: dict[str, Any] = {"dsn": dsn}
    answer: list[Any] = []
    for language, text in BLOCKS:
        if language == "python":
            exec(compile(text, "encoders.md", "exec"), names)
        elif language == "sh":
            for line in text.splitlines():
                subprocess.run(shlex.split(line), env=environment, check=True)
        else:
            assert language == "sql"
            for statement in filter(None, text.split(";\n")):
                values = (file,) * statement.count("$1")
                cursor = db.execute(statement.replace("$1", "%b"), values)
            answer = cursor.fetchall()
    assert len(answer) == 1
    printed = re.findall(r"^(\w+) ([\d.]+)$", capsys.readouterr().out, re.M)
    assert [name for name, _ in printed] == list(EVALUATED)
    assert all(float(cosine) >= 0.9999 for _, cosine in printed), printed

    for name, (side, method, seen) in EVALUATED.items():
        resized = photograph.resize((round(side * 467 / 300), side), method)
        left, top = ((length - seen) // 2 for length in resized.size)
        middle = np.array(resized.crop((left, top, left + seen, top + seen)))
        encoder = names["encoders"][name]
        encoder.margin = 0
        with torch.no_grad():
            expected = encoder(torch.from_numpy(middle)[None])[0].numpy()
        found = one(db, "SELECT embed_image(%s, %s)::real[]", file, name)
        assert found @ expected >= 0.9999, name


def test_fixed_batch_is_noticed(
    libraries: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exporter fixes the batch of such a network without a warning, unlike torch.export."""

    class Counting(ResNet):
        def forward(self, x: Any) -> Any:
            return super().forward(x).reshape(len(x), -1)

    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    recipe = next(text for language, text in BLOCKS if language == "python")
    exec(compile(recipe, "encoders.md", "exec"), names)
    with pytest.raises(ValueError, match="fixes its batch at 2"):
        names["export"](Counting((1, 1), 8), "counting.onnx")
