"""What the documents name exists."""

import glob
import importlib.util
import os
import pathlib
import re

import pytest
from conftest import ROOT

DOCUMENTS = [os.path.join(ROOT, "README.md"), *sorted(glob.glob(os.path.join(ROOT, "docs", "*.md")))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=os.path.basename)
def test_named_things_exist(path):
    text = pathlib.Path(path).read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert os.path.exists(os.path.join(os.path.dirname(path), target)), f"broken link {target}"
    for module in re.findall(r"python -m (capvl[\w.]*)", text):
        assert importlib.util.find_spec(module), f"no module {module}"
    for config in re.findall(r"configs/(\w+\.py)", text):
        assert os.path.exists(os.path.join(ROOT, "configs", config)), f"no config {config}"
    for name in re.findall(r"`(capvl\.\w+(?:\.\w+)*\.[A-Z]\w+)`", text):
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
    for file in re.findall(r"`(capvl/[\w/]+\.py)`", text):
        assert os.path.exists(os.path.join(ROOT, file)), file
