"""The runtime of an exported model: original item ids in, recommendations out. Needs numpy and onnxruntime, nothing else.

This package is copied into every exported folder, which therefore works alone. From within the folder:

    from recommender import Recommender
    model = Recommender.load(".")
    model.recommend(["1193", "661", "914"], k=10)
    model.recommend(["1193", "661", "914"], ratings=[5, None, 3], times=[978300760, 978302109, 978301968])

Ratings and times help where the model was trained with them (`model.inputs`); it ignores them where it was not.

or, in a shell, from anywhere: `python FOLDER/recommender --history 1193,661,914`.
"""

from .answers import Item, Recommendation
from .manifest import ArtefactError
from .model import Recommender

__all__ = ["ArtefactError", "Item", "Recommendation", "Recommender"]
