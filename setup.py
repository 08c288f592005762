"""Loss-gated self-supervised speaker recognition: package metadata."""

import re
from pathlib import Path

from setuptools import find_packages, setup

INIT = Path(__file__).with_name("lgl_plugin") / "__init__.py"
# myst-nb brings what runs the tutorial: nbclient and ipykernel.
DOCS = ["sphinx>=8.1", "furo>=2024.8", "myst-parser>=4", "myst-nb>=1.1"]

setup(
    name="lgl-plugin",
    version=re.search(r'__version__ = "(.+)"', INIT.read_text("utf-8"))[1],
    description="Loss-gated self-supervised speaker recognition "
    "for SpeechBrain",
    long_description=Path(__file__).with_name("README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Multimedia :: Sound/Audio :: Speech",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=["lgl_plugin*"]),
    # lgl_plugin/recipe is a link, of which wheels and sdists get the files.
    package_data={
        "lgl_plugin": [
            "py.typed",
            "inference/*.md",
            "report/*.html",
            "recipe/*.py",
            "recipe/*.sh",
            "recipe/*.md",
            "recipe/*/*.yaml",
        ]
    },
    entry_points={"console_scripts": ["lgl = lgl_plugin.cli.main:main"]},
    python_requires=">=3.10,<3.13",
    # What should work; requirements.txt pins what was tested.
    install_requires=[
        # Private names are used in one module: the range is what was tested.
        "speechbrain>=1.1.2,<1.2",
        # torch and torchaudio must be of the same minor version. From 2.6 on
        # checkpoints are read without running code.
        "torch>=2.6",
        "torchaudio>=2.6",
        "hyperpyyaml>=1.2",
        "pyyaml>=6",
        "numpy>=1.25",
        "scipy>=1.11",
        "scikit-learn>=1.3",
        "soundfile>=0.12.1",
        # From 3.31 on a forked process drops its parent's lock.
        "filelock>=3.31",
        "tqdm>=4.42",
        "matplotlib>=3.7",
        "jinja2>=3.1",
        "pydantic>=2.6",
        "huggingface_hub>=0.20",
        "ruamel.yaml>=0.17.28",
    ],
    extras_require={
        # One of the two: both provide the module `faiss`.
        "cpu": ["faiss-cpu>=1.8"],
        # The faiss project's own wheels: CUDA 12, its runtime included. The
        # older ones of this name (1.7) are others' and stop at Python 3.10.
        "gpu": ["faiss-gpu>=1.14"],
        # `lgl export --onnx` writes by the first and checks by the second.
        "onnx": ["onnx>=1.16", "onnxruntime>=1.18"],
        # WavLM, HuBERT, wav2vec 2.0 and w2v-BERT 2.0, by transformers.
        "ssl": ["transformers>=4.50"],
        "demo": ["espeakng-loader>=0.2.4"],
        "docs": DOCS,
        "test": [
            *DOCS,  # built by the tests
            "onnx>=1.16",
            "onnxruntime>=1.18",
            "transformers>=4.50",
            "setuptools>=70.1",  # from then on a wheel needs nothing else
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "ruff==0.12.4",
            "mypy>=2",
            "import-linter>=2.1",
            "yamllint==1.35.1",
            "codespell>=2.3",
        ],
    },
)
