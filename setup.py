"""Stillhouse, installed as an editable checkout: pip install -c constraints.txt -e ."""

from setuptools import find_packages, setup

ONNX = ["onnx>=1.17", "onnxscript>=0.3", "onnxruntime>=1.20"]

setup(
    name="stillhouse",
    version="0.1.0",
    description="A cluster-scale DeepSpeed engine for distilling language models",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["engine", "engine.*", "data_tools", "launch"]),
    install_requires=[
        "torch>=2.8",
        "deepspeed>=0.18,<0.20",
        "transformers>=5.0,<6",
        "datasets>=4.0,<6",
        "pyarrow>=21.0",
        "webdataset>=1.0,<2",
        "fsspec[http]>=2024.6",
        "s3fs>=2024.6",
        "pydantic>=2.7,<3",
        "pyyaml>=6.0",
        "numpy>=1.26",
        "tokenizers>=0.21",
        "zstandard>=0.22",
        "psutil>=5.9",
        "tqdm>=4.66",
        "matplotlib>=3.8",
        "jinja2>=3.1",
        "ninja>=1.11",
        "wandb>=0.18",
        "tensorboard>=2.16",
        "scikit-learn>=1.3",
        "seqeval>=1.2",
    ],
    extras_require={
        "onnx": ONNX,
        "test": [
            *ONNX,
            "dockerfile-parse>=2",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "ruff>=0.6",
            "mypy>=1.11",
            "types-PyYAML",
            "types-tqdm",
        ],
        "benchmarks": ["trl>=0.25", "mosaicml-streaming>=0.10"],
    },
)
