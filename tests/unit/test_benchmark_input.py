"""The input benchmark runs, tiny, and what it writes is whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.cluster
def test_every_way_is_measured_in_every_case(tmp_path: Path):
    command = [sys.executable, "benchmarks/input.py", "--num-images", "100", "--rounds", "2", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "input.json").read_text())
    ways = ["this loader, decoded cache", "this loader, encoded", "floor", "torchvision + DataLoader", "Ray Data"]
    cases = [(size, layout) for size in (32, 224) for layout in ("contiguous", "channels_last")]
    results = written["results"]
    assert [(r["image_size"], r["layout"], r["way"]) for r in results] == [(*c, way) for c in cases for way in ways]
    for r in results:
        assert r["num_images"] == (100 if r["image_size"] == 32 else 10)
        assert r["images_per_second"]["n"] == r["floor_over_this"]["n"] == 2
        assert r["images_per_second"]["low"] > 0
        assert (r["ratio_to_dataloader"]["median"] == 1) >= (r["way"] == "torchvision + DataLoader")
        assert f"{r['image_size']} px {r['layout']}, {r['way']}" in done.stdout
