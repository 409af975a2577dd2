"""Export to an integer model, and the runtime that serves it, which needs numpy and onnxruntime alone."""

from sasrec.deploy.recommender import ArtefactError, Recommender

__all__ = ["ArtefactError", "Recommender"]
