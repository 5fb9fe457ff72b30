"""Files of regions for tests: an image, COCO's and RefCOCO's annotations, and what is made of them."""

import io
import json

import numpy as np
from PIL import Image

from capvl.data.preparing import region_sets

SIZE = (30, 40)


def picture(size=SIZE, orientation=1, kind="JPEG") -> bytes:
    tags, buffer = Image.Exif(), io.BytesIO()
    tags[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, kind, exif=tags)
    return buffer.getvalue()


def coco(tmp_path, count=6, name="instances.json"):
    """COCO's images 1 to `count`, one box and one caption each."""
    (tmp_path / "images").mkdir(exist_ok=True)
    for i in range(1, count + 1):
        (tmp_path / f"images/{i:012d}.jpg").write_bytes(picture())
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "height": 30, "width": 40} for i in range(1, count + 1)]
    rows = [{"image_id": i, "category_id": 1, "bbox": [i, 3, 16, 12]} for i in range(1, count + 1)]
    said = [{"image_id": i, "caption": f"caption {i}"} for i in range(1, count + 1)]
    instances = {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "dog"}]}
    (tmp_path / name).write_text(json.dumps(instances))
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": said}))
    return [str(tmp_path / name), str(tmp_path / "captions.json")]


def refs(tmp_path, splits):
    """RefCOCO of images 1 …: split of each."""
    rows = [
        {"ref_id": i, "ann_id": i, "image_id": i, "split": own, "sentences": [{"sent": f"dog {i}"}]}
        for i, own in enumerate(splits, 1)
    ]
    (tmp_path / "refs.json").write_text(json.dumps(rows))
    values = json.loads((tmp_path / "instances.json").read_text())
    for i, row in enumerate(values["annotations"], 1):
        row["id"] = i
    (tmp_path / "refs_instances.json").write_text(json.dumps(values))
    return [str(tmp_path / "refs.json"), str(tmp_path / "refs_instances.json")]


def make(tmp_path, name, format, splits, **options):
    options = {"workers": 1} | options
    return region_sets.prepare(name, format, splits, str(tmp_path / "images"), str(tmp_path / "out"), **options)


def report(folder, split="train"):
    return json.loads((folder / "report.json").read_text())[split]
