"""The parameters of a study as frozen dataclasses, one per section of params.yaml; `sasrec.mapping` reads them."""

import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sasrec.errors import UserError
from sasrec.mapping import from_mapping, unknown, within


@dataclass(frozen=True)
class Columns:
    """Names of the columns of the user's own file. A default name that the file lacks is left out (rating, category,
    and timestamp, which then means file order); any other name that the file lacks is an error. null: do not read it."""

    user: str = "user"
    item: str = "item"
    timestamp: str | None = "timestamp"
    rating: str | None = "rating"
    category: str | None = "category"


# The value of dataset.path that means "no local file": DVC needs the path of a file that exists.
NO_FILE = "data/.gitkeep"


@dataclass(frozen=True)
class DatasetParams:
    name: str = "sample"
    path: str = NO_FILE
    sha256: str | None = None
    format: str | None = None
    separator: str | None = None
    quotes: bool = True
    times: Literal["comparable", "order"] | None = None
    category_separator: str | None = None
    columns: Columns = field(default_factory=Columns)


@dataclass(frozen=True)
class SampleParams:
    """Size of the built-in simulated data set."""

    users: int = 1500
    items: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        within("users", self.users, 10)
        within("items", self.items, 20)
        within("seed", self.seed, 0)


@dataclass(frozen=True)
class PrepareParams:
    min_user: int = 5
    min_item: int = 5
    min_rating: float | None = None
    # once: both thresholds are counted on the raw data, as the SASRec authors do; k_core: iterated until nothing falls out.
    filter: Literal["once", "k_core"] = "once"
    duplicates: Literal["keep", "first", "last"] = "keep"
    split: Literal["leave_one_out", "temporal"] = "leave_one_out"
    # Of the temporal split: shares of all interactions in the two last periods, and which one of a user's there is asked for.
    test_share: float = 0.1
    validation_share: float = 0.1
    target: Literal["last", "first"] = "last"
    # Candidates per user of the sampled protocols, and the seed they are drawn with.
    candidates: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        within("min_user", self.min_user, 1)
        within("min_item", self.min_item, 1)
        for name in ("test_share", "validation_share"):
            within(name, getattr(self, name), 0.001, 0.9)
        if self.test_share + self.validation_share > 0.95:
            raise ValueError(
                f"test_share and validation_share are {self.test_share + self.validation_share:g} of the data; "
                "leave at least 0.05 to train on"
            )
        within("candidates", self.candidates, 1, 100_000)
        within("seed", self.seed, 0)


Block = Literal["original", "pre_norm", "post_norm"]
Side = Literal["rating", "category", "recency"]
Position = Literal["right", "left", "none"]


@dataclass(frozen=True)
class ModelParams:
    # sasrec: also gSASRec, which differs in its loss; cafe: needs items with categories.
    kind: Literal["sasrec", "cafe"] = "sasrec"
    max_len: int = 50
    hidden: int = 64
    blocks: int = 2
    heads: int = 1
    ffn_dim: int | None = None  # null: as wide as hidden
    dropout: float = 0.4
    block: Block = "pre_norm"
    # right: the last item always has the last position; left: the first item of a window has position 0.
    position: Position = "right"
    embedding_norm: bool = False
    final_norm: bool = True
    # A projection of the attention. Redundant with one head, where it only follows the value projection; the paper has none.
    attention_output: bool = False
    tied: bool = True
    # normal: all matrices as small as the embeddings, so that attention does not drown the last item, which the residual
    # carries, before it has learned anything; xavier: by their sizes.
    init: Literal["normal", "xavier"] = "normal"
    # Of the heads, how many re-weight what they see by item and distance, and how far back they may look (null: no limit).
    local_heads: int = 0
    local_window: int | None = None
    # What is known of each past event, added to its embedding; never anything of the item that is asked for.
    side: tuple[Side, ...] = ()
    time_bias: bool = False  # a learned bias of attention by the time between two past events

    def __post_init__(self) -> None:
        for name in ("max_len", "hidden", "blocks", "heads", "ffn_dim"):
            within(name, getattr(self, name), 1)
        if len(set(self.side)) < len(self.side):
            raise ValueError(f"side names one twice: {', '.join(self.side)}")
        within("dropout", self.dropout, 0, 0.95)
        if self.hidden % self.heads:
            raise ValueError(f"hidden ({self.hidden}) must be a multiple of heads ({self.heads})")
        within("local_heads", self.local_heads, 0, self.heads)
        within("local_window", self.local_window, 1)
        if self.local_window is not None and not self.local_heads:
            raise ValueError("local_window is set, but no head is local; set local_heads, or leave local_window empty")


Loss = Literal["bce", "gbce", "sampled_softmax", "cross_entropy", "bpr"]


@dataclass(frozen=True)
class TrainParams:
    loss: Loss = "cross_entropy"
    # Per position for bce, gbce and bpr; shared by the whole batch for sampled_softmax, and by the positions of one sequence
    # for gbce with shared_negatives.
    negatives: int = 256
    shared_negatives: bool = True
    negatives_from: Literal["unseen", "all"] = "unseen"
    # popularity: the negatives of sampled_softmax are drawn by training counts, and their logits corrected for it (logQ).
    negative_sampling: Literal["uniform", "popularity"] = "uniform"
    gbce_t: float = 0.75
    rating_weight: float = 0.0  # of a second task's loss: the rating that the next item gets
    # Of a model with intents (cafe): the weight of their own loss, and what the loss of the items is of.
    intent_weight: float = 1.0
    item_loss: Literal["joint", "items"] = "joint"
    windows: Literal["last", "all"] = "all"
    # packed: a batch holds windows of any length, side by side in rows without padding; shuffled: the same windows, each
    # padded to the longest; bucketed: windows of about the same length.
    batching: Literal["packed", "shuffled", "bucketed"] = "packed"
    # position: every position of an epoch weighs the same; batch: every batch does, so that short windows count for more.
    weighting: Literal["position", "batch"] = "position"
    # bfloat16: the factors of matrix products are rounded to bfloat16 in training, sums and everything else are float32.
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    epochs: int = 60
    batch_size: int = 128  # windows
    min_batches: int = 50  # of an epoch: on small data batches are smaller, because it takes a number of steps to learn
    lr: float = 1e-3
    optimizer: Literal["adam", "adamw"] = "adam"
    # Of the tables of items. sparse: a step changes the rows that it looks up, and no others (lazy Adam).
    table_optimizer: Literal["dense", "sparse"] = "dense"
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine", "one_cycle"] = "cosine"
    warmup: float = 0.02  # share of all steps
    # Dropout falls in equal steps from model.dropout in the first epoch to this in the last; None: it stays.
    final_dropout: float | None = None
    clip_norm: float | None = None
    patience: int = 10  # validations without a new best before stopping
    evaluate_every: int = 1
    select_on: Literal["full", "sampled"] = "full"

    def __post_init__(self) -> None:
        for name in ("negatives", "batch_size", "min_batches", "evaluate_every", "patience"):
            within(name, getattr(self, name), 1)
        within("epochs", self.epochs, 0)
        within("gbce_t", self.gbce_t, 0, 1)
        within("rating_weight", self.rating_weight, 0)
        within("intent_weight", self.intent_weight, 0)
        if self.negative_sampling == "popularity" and self.loss != "sampled_softmax":
            raise ValueError(
                f"negative_sampling is popularity, which loss: {self.loss} cannot correct for; "
                "set negative_sampling: uniform, or loss: sampled_softmax"
            )
        if self.table_optimizer == "sparse" and self.loss == "cross_entropy":
            raise ValueError(
                "table_optimizer is sparse, but loss: cross_entropy scores every item, and its gradient reaches every row; "
                "set table_optimizer: dense, or loss: sampled_softmax"
            )
        within("warmup", self.warmup, 0, 1)
        within("final_dropout", self.final_dropout, 0, 0.95)
        within("weight_decay", self.weight_decay, 0)
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm must be above 0 or empty, not {self.clip_norm}")
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, not {self.lr}")


@dataclass(frozen=True)
class QuantParams:
    bits: int = 8
    weight_bits: int | None = None
    activation_bits: int | None = None
    embedding_bits: int | None = None
    overrides: dict[str, int] = field(default_factory=dict)  # tensor name -> bits; 32 leaves it in full precision
    model: str = "sasrec"
    # checkpoint: the trained model; control: that model trained on for as long in full precision; scratch: nothing.
    init: Literal["checkpoint", "control", "scratch"] = "checkpoint"
    # all: every tensor at its width; paper: first and last layer, and the stream between, at 8 bits; source: as the study
    # that this one redoes.
    preset: Literal["all", "paper", "source"] = "all"
    epochs: int = 5
    lr: float | None = None  # None: by the narrowest width (sasrec.quant.rates)
    dropout: float | None = None  # of the training with quantizers, and of the control's; None: the model's
    table: Literal["per_row", "per_tensor"] = "per_row"
    weights: Literal["per_row", "per_tensor"] = "per_row"
    # Of what blocks pass on to each other, which enters no product: a scale per feature, or one.
    stream: Literal["per_feature", "per_tensor"] = "per_feature"
    centre: bool = True  # take the means off what norms give and off keys, into biases, before a trained model is quantized
    calibration_batches: int = 8
    distill: float = 0.0  # share of the loss that is the divergence from the full-precision model's scores
    delay_epochs: int = 0  # of quant.epochs, trained before the quantizers come in
    progressive: tuple[int, ...] | None = None  # widths on the way down to the study's, each for an equal share of the epochs
    table_rounding: Literal["nearest", "stochastic"] = "nearest"  # of the embedding tables, in training
    # Mixed widths of weights and tables by their sensitivity: the best model of at most so many kB of both, or the
    # smallest whose validation loss is at most so much above the full-precision model's.
    budget_kb: float | None = None
    max_drop: float | None = None

    def __post_init__(self) -> None:
        for name in ("bits", "weight_bits", "activation_bits"):
            within(name, getattr(self, name), 2, 8)
        within("embedding_bits", self.embedding_bits, 1, 8)
        for tensor, bits in self.overrides.items():
            if bits != 32:
                within(f"overrides.{tensor}", bits, 1, 8)
        within("epochs", self.epochs, 0)
        within("calibration_batches", self.calibration_batches, 1)
        within("dropout", self.dropout, 0, 0.95)
        within("distill", self.distill, 0, 1)
        within("delay_epochs", self.delay_epochs, 0)
        widths = self.progressive or ()
        for bits in widths:
            within("progressive", bits, 2, 8)
        if any(a <= b for a, b in zip(widths, widths[1:], strict=False)):
            raise ValueError(f"progressive must fall from width to width, not {', '.join(map(str, widths))}")
        if self.budget_kb is not None and self.max_drop is not None:
            raise ValueError("budget_kb and max_drop are both given; set one of them")
        if self.budget_kb is not None and self.budget_kb <= 0:
            raise ValueError(f"budget_kb must be above 0, not {self.budget_kb}")
        within("max_drop", self.max_drop, 0)
        if self.lr is not None and self.lr <= 0:
            raise ValueError(f"lr must be above 0 or empty, not {self.lr}")
        self._check_training()

    @property
    def from_scratch(self) -> bool:
        """Whether what trains starts from an untrained network."""
        return self.init == "scratch" or self.preset == "source"

    def _check_training(self) -> None:
        """Raises ValueError for settings that would do nothing, or not what they say."""
        mixed = next((name for name in ("budget_kb", "max_drop") if getattr(self, name) is not None), None)
        kinds = (self.weight_bits, self.activation_bits, self.embedding_bits)
        least = min(*(self.bits if bits is None else bits for bits in kinds), *self.overrides.values())
        if self.progressive and mixed is None and self.progressive[-1] <= least:
            raise ValueError(
                f"progressive ends at {self.progressive[-1]} bits, and no tensor has fewer than {least}; name wider ones"
            )
        if self.from_scratch and mixed is not None:
            raise ValueError(f"{mixed} is found out on a trained model, and from scratch there is none; use init: checkpoint")
        if self.preset == "source" and self.init == "control":
            raise ValueError("init: control does not go with preset: source, which trains from scratch")
        if mixed is not None and (own := next((n for n in ("weight_bits", "embedding_bits") if getattr(self, n)), None)):
            raise ValueError(f"{mixed} chooses the widths that {own} gives; leave {own} empty, or set single ones in overrides")
        for name in ("delay_epochs", "progressive", "distill"):
            if getattr(self, name) and not self.from_scratch and not self.epochs:
                raise ValueError(f"{name} is of the training, and epochs is 0")


@dataclass(frozen=True)
class EvaluateParams:
    exclude_seen: bool = True
    bootstrap: int = 1000
    seed: int = 0
    batch_size: int = 512
    recent_days: float = 7.0
    knn_neighbours: int = 100
    knn_last: int = 10

    def __post_init__(self) -> None:
        within("seed", self.seed, 0)
        within("bootstrap", self.bootstrap, 100)
        within("batch_size", self.batch_size, 1)
        # At most a century, because nanoseconds of three no longer fit 64 bits.
        if not 0 < self.recent_days <= 36_525:
            raise ValueError(f"recent_days must be above 0 and at most 36525, not {self.recent_days}")
        within("knn_neighbours", self.knn_neighbours, 1)
        within("knn_last", self.knn_last, 1)


@dataclass(frozen=True)
class BenchmarkParams:
    threads: int = 1
    batch_sizes: tuple[int, ...] = (1, 32, 512)
    repeats: int = 7
    peers: bool = True  # the same network by torch and onnxruntime in full precision, and by onnxruntime's own int8
    compile: bool = False  # torch.compile, too

    def __post_init__(self) -> None:
        within("threads", self.threads, 1, 1024)
        within("repeats", self.repeats, 3)
        if not self.batch_sizes:
            raise ValueError("batch_sizes is empty: name at least one")
        for size in self.batch_sizes:
            within("batch_sizes", size, 1)


@dataclass(frozen=True)
class Study:
    """All of params.yaml. The options of `methods.<name>` are declared in `sasrec/quant/<name>.py` and checked there."""

    models: tuple[str, ...]
    quantized: tuple[str, ...]
    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    threads: int = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dataset: DatasetParams = field(default_factory=DatasetParams)
    sample: SampleParams = field(default_factory=SampleParams)
    prepare: PrepareParams = field(default_factory=PrepareParams)
    model: ModelParams = field(default_factory=ModelParams)
    train: TrainParams = field(default_factory=TrainParams)
    per_model: dict[str, dict[str, Any]] = field(default_factory=dict)
    quant: QuantParams = field(default_factory=QuantParams)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    evaluate: EvaluateParams = field(default_factory=EvaluateParams)
    benchmark: BenchmarkParams = field(default_factory=BenchmarkParams)

    def __post_init__(self) -> None:
        within("threads", self.threads, 1, 1024)
        for name in ("models", "variants", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: name at least one")
        for name in ("models", "quantized", "variants", "seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} names one twice: {', '.join(map(str, values))}")
        for seed in self.seeds:
            within("seeds", seed, 0, 2**63 - 1)

    def of_model(self, name: str) -> tuple[ModelParams, TrainParams]:
        """The model and train sections as `per_model.<name>` overrides them."""
        if name not in self.per_model:
            raise unknown("model", name, self.per_model)
        overrides = self.per_model[name]
        for section in overrides:
            if section not in ("model", "train"):
                raise unknown("key", f"per_model.{name}.{section}", [f"per_model.{name}.{s}" for s in ("model", "train")])
        model = from_mapping(ModelParams, overrides.get("model"), f"per_model.{name}.model", self.model)
        return model, from_mapping(TrainParams, overrides.get("train"), f"per_model.{name}.train", self.train)


# What is measured beside the models of every study, in metrics/<name>.json, too.
BASELINES = ("popularity", "recent_popularity", "markov", "item_knn")


def known_methods() -> set[str]:
    """The quantization methods that exist. A method's file says whether it trains; importing it to see would import torch."""
    files = Path(__file__).with_name("quant").glob("*.py")
    return {file.stem for file in files if "\nTRAINS = " in file.read_text(encoding="utf-8")}


def check_names(study: Study, methods: typing.Iterable[str]) -> None:
    """Refuse names in the lists that nothing provides. `methods`: the quantization methods that exist."""
    for model in study.models:
        study.of_model(model)
    known = set(methods)
    for model in study.per_model:
        if model in known:
            raise UserError(f"params.yaml: per_model.{model}: a model cannot have the name of a method; name it otherwise")
        if model in BASELINES:
            raise UserError(f"params.yaml: per_model.{model}: a model cannot have the name of a baseline; name it otherwise")
    for method in study.quantized:
        if method not in known:
            raise unknown("method in the list quantized", method, known)
    for method in study.methods:
        if method not in known:
            raise unknown("key", f"methods.{method}", [f"methods.{name}" for name in known])
    for variant in study.variants:
        if variant not in known | set(study.per_model):
            raise unknown("variant", variant, known | set(study.per_model))
        if variant not in study.models + study.quantized:
            raise UserError(f"params.yaml: variants names '{variant}', which is in neither models nor quantized")
    if study.quant.model not in study.per_model:
        raise unknown("model in quant.model", study.quant.model, study.per_model)
    if study.quant.model not in study.models:
        raise UserError(f"params.yaml: quant.model is '{study.quant.model}', which is not in the list models")
