"""CaFe as an ONNX graph: its two encoders on one history, and what their states are made to (`sasrec.models.cafe`)."""

from dataclasses import dataclass, field

from sasrec.deploy.encoder import Encoder, Value
from sasrec.deploy.graph import Graph
from sasrec.deploy.indices import index_of
from sasrec.deploy.storage import Storage
from sasrec.models.cafe import CAFE
from sasrec.quant.frozen import FrozenTensor


@dataclass
class CoarseToFineEncoder:
    """As `Encoder`, for a CAFE: returns states (batch, 1, 2 hidden)."""

    model: CAFE
    frozen: dict[str, FrozenTensor]
    storage: Storage
    graph: Graph = field(default_factory=lambda: Graph("encoder"))
    products: dict[str, str] = field(default_factory=dict)

    def build(self) -> Value:
        graph = self.graph
        shared = self.frozen, self.storage, graph, self.products
        coarse = Encoder(self.model.coarse, *shared, prefix="coarse.")
        fine = Encoder(self.model.fine, *shared, prefix="fine.")
        intents = index_of(graph, self.storage, self.model.scoring_parts[1])
        intent_state = coarse.state(graph.node("Gather", intents, "items"))
        both = graph.node("Add", fine.state("items"), intent_state)
        return fine.tap(graph.node("Concat", both, intent_state, axis=-1), "final")
