"""Packaging of hff_modules."""

from pathlib import Path

from setuptools import find_packages, setup

PLOTS = ["matplotlib>=3.8"]
FEATURES = ["h5py>=3.10"]  # one archive of features
SERVICE = ["fastapi>=0.115", "uvicorn>=0.30"]
PEERS = ["peft>=0.18"]  # what we compare with

setup(
    name="hff-modules",
    version="0.1.0",
    description=(
        "Layer selection, hierarchical feature fusion and adapters for frozen speech encoders, "
        "as a SpeechBrain recipe extension"
    ),
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["hff_modules", "hff_modules.*"]),
    package_data={"hff_modules": ["data/*.txt", "pretrained/*/*", "service.html"]},
    python_requires=">=3.11",
    install_requires=[
        # torchaudio ends at 2.11 and loads only beside the same build of torch.
        "torch==2.11.*",
        "torchaudio==2.11.*",
        "speechbrain>=1.1.2,<1.2",
        # Before 5.16 w2v-BERT's attention does not go through AttentionInterface, our way in.
        "transformers>=5.16,<6",
        "hyperpyyaml>=1.2.2",
        "sentencepiece>=0.2",
        "jiwer>=3.0",
        "safetensors>=0.4",
        "huggingface_hub>=0.34",
        "numpy",
        "tqdm",
        "soundfile>=0.12",
        "espeakng-loader>=0.2.4",
        "tensorboard>=2.15",
    ],
    extras_require={
        "plots": PLOTS,
        "features": FEATURES,
        "service": SERVICE,
        "peers": PEERS,
        "dev": ["pytest>=8", "pytest-xdist>=3.5", "ruff>=0.9"] + PLOTS + FEATURES + SERVICE + PEERS,
    },
)
