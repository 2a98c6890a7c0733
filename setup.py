"""Packaging of `comemo` (the model and its command) and `comemo_kernels` (the operations)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "comemo_kernels/__init__.py").read_text(), re.MULTILINE
)[1]

setup(
    name="comemo-kernels",
    version=VERSION,
    description="CoMemo, a vision-language model with an image memory, and its operations",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE", "THIRD_PARTY_NOTICES.md"],
    python_requires=">=3.10",
    packages=find_packages(include=["comemo", "comemo.*", "comemo_kernels", "comemo_kernels.*"]),
    package_data={
        "comemo": ["py.typed"],
        "comemo.nano": ["photographs/*.jpg", "checkpoint/*"],
        "comemo.serve": ["page/*"],
        "comemo_kernels": ["py.typed"],
    },
    entry_points={"console_scripts": ["comemo = comemo.cli.main:main"]},
    install_requires=[
        "torch>=2.6",
        "triton>=3.3; platform_system == 'Linux'",
        "transformers>=5.10,<5.25",  # the next minor release was never run
        "einops",
        "safetensors",
        "sentencepiece",
        "jinja2",
        "numpy",
        "pillow",
        "tqdm",
    ],
    extras_require={
        "flash": ["flash-attn"],  # for attn_implementation="flash_attention_2"
        "flash-attn": ["flash-attn"],  # the old name of "flash"
        "train": ["accelerate", "filelock", "peft", "pyyaml", "tensorboardx"],
        "serve": ["fastapi", "prometheus-client", "uvicorn"],
        "ray": ["fastapi", "prometheus-client", "ray[serve]>=2.58", "uvicorn"],  # several machines
        "quantized": ["torchao>=0.18"],  # weights of 8 or 4 bits
        "video": ["av"],  # video files as training data; folders of frames need nothing
        "dev": [
            "accelerate",  # used by Trainer and `device_map`
            "fastapi",  # the server, with uvicorn and prometheus-client
            "httpx",  # its test client
            "hypothesis",
            "matplotlib",
            "mypy",
            "openai",  # a client of the server
            "peft",  # adapters
            "prometheus-client",
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "pyyaml",  # reads CITATION.cff and settings of training
            "ruff",
            "scikit-image",  # photographs for the tests
            "selenium",  # the page in a browser
            "tensorboardx",
            "setuptools",  # builds the wheel that is tested
            "uvicorn",
        ],
    },
)
