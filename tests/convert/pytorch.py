"""timm and open_clip for tests where torchvision can't be had for this PyTorch, and real photos."""

import importlib.machinery
import io
import itertools
import sys
import tarfile
import types

import pytest
from conftest import real_data
from PIL import Image

torch = pytest.importorskip("torch", reason="PyTorch is not installed")


class Anything(type):
    """Classes that have every attribute."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


def has_torchvision(monkeypatch) -> bool:
    """Whether torchvision's transforms can be imported, if need be without kernels, whose build for CPUs may lack."""
    try:
        import torchvision.transforms
    except ImportError:
        return False
    except RuntimeError:
        monkeypatch.setattr(torch.library, "register_fake", lambda *args, **kwargs: lambda function: function)
        try:
            import torchvision.transforms
        except RuntimeError:
            return False
    return True


def import_anyway(monkeypatch, name):
    """timm or open_clip, whose models need nothing of torchvision, though they import it."""
    if not has_torchvision(monkeypatch):
        for part in ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets", ".datasets.folder"):
            module = types.ModuleType("torchvision" + part)
            module.__spec__ = importlib.machinery.ModuleSpec("torchvision" + part, None)
            module.__path__ = []
            module.__getattr__ = _anything
            monkeypatch.setitem(sys.modules, "torchvision" + part, module)
            parent, _, child = ("torchvision" + part).rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
    return pytest.importorskip(name)


def _anything(attribute):
    if attribute.startswith("__"):
        raise AttributeError(attribute)
    return Anything(attribute, (torch.nn.Module,), {})


@pytest.fixture
def timm(monkeypatch):
    """timm, with or without torchvision."""
    return import_anyway(monkeypatch, "timm")


@pytest.fixture
def open_clip(monkeypatch):
    """open_clip, with or without torchvision."""
    import_anyway(monkeypatch, "timm")
    return import_anyway(monkeypatch, "open_clip")


def photos(count: int) -> list[bytes]:
    """Encoded photos of many shapes, from COCO and Flickr8k, one after the other."""
    found = []
    for parts in (("coco128", "val2017", "00000.tar"), ("flickr8k", "val", "00000.tar")):
        with tarfile.open(real_data(*parts)) as archive:
            members = (m for m in archive if m.name.endswith(".jpg"))
            found.append(
                [archive.extractfile(m).read() for _, m in zip(range((count + 1) // 2), members, strict=False)]
            )
    return [photo for pair in zip(*found, strict=True) for photo in pair][:count]


def opened(data: bytes) -> Image.Image:
    """As Pillow decodes a photo."""
    return Image.open(io.BytesIO(data)).convert("RGB")
