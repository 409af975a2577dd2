"""Sequential recommenders and their quantization: models, methods, protocols, and the integer artefact."""

__version__ = "0.1.0"
