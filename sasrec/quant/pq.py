"""PQ: product quantization of the item table (Jegou, Douze and Schmid, IEEE TPAMI 33, 2011), with centroids that are trained.

Every row of the table is cut into `splits` parts, and each part is replaced by one of `centroids` vectors of that split, so
that an item is stored as one number a split. As in JPQ (Zhan et al., CIKM 2021, arXiv 2108.00644) and RecJPQ (Petrov and
Macdonald, WSDM 2024, arXiv 2312.06165) the numbers stay what they are, and the centroids are trained with the rest of the
network, each by the sum of the gradients of the items that share it. Numbers come from k-means of the trained table, or as
RecJPQ assigns them, from a truncated SVD of the training interactions. Here the centroids lie on a grid of the table's width
with one scale, so that the table put together from them is one of integers; other tensors are quantized by the method `rest`.
"""

import sys
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn

from sasrec.config import QuantParams
from sasrec.data.sequences import training_part
from sasrec.errors import UserError
from sasrec.mapping import within
from sasrec.models.taps import Place
from sasrec.quant import attach, lsq
from sasrec.quant.frozen import Product
from sasrec.quant.grid import Grid
from sasrec.quant.quantizer import Quantizer

TRAINS = True
RATES = lsq.RATES

# The tables of items. Of CaFe's two encoders one has intents for items, too few to share centroids.
TABLES = ("item_table.weight", "output_table.weight", "fine.item_table.weight", "fine.output_table.weight")
# Of RecJPQ: what is added to a component, as a share of its range, so that no two items are level.
NOISE = 1e-5
# Of the truncated SVD: components beyond those asked for, and power iterations.
OVERSAMPLED, POWERS = 10, 7
# Rows whose distances from all centroids are worked out at once.
ROWS_AT_ONCE = 2**14


@dataclass(frozen=True)
class Options:
    splits: int = 8  # parts of a row; they divide model.hidden
    centroids: int = 256  # of each split; an item takes the bits of one of their numbers a split
    # kmeans: of the trained table's parts. svd: quantiles of each component of the training interactions' SVD.
    codes: Literal["kmeans", "svd"] = "kmeans"
    iterations: int = 50  # of k-means at most
    rest: Literal["lsq", "ste", "none"] = "lsq"  # what quantizes the other tensors; none: they stay in full precision
    # Of the logarithm of LSQ's steps; null: LSQ's rates. Centroids are trained at quant.lr.
    lr: float | None = None

    def __post_init__(self) -> None:
        within("splits", self.splits, 1)
        within("centroids", self.centroids, 2, 256)
        within("iterations", self.iterations, 1)
        within("lr", self.lr, 0)
        if self.rest != "none":
            attach.load_method(self.rest, None)  # now, so that a resume file names its code, too


@dataclass(frozen=True)
class Prepared:
    """Options with what they need of a run. assigned: (items, splits) numbers of centroids, where not the table gives them."""

    options: Options
    seed: int = 0
    assigned: Tensor | None = None

    @property
    def lr(self) -> float | None:
        return self.options.lr


def check(model: nn.Module, quant: QuantParams, options: Options) -> None:
    """Raise UserError where the model or the section quant does not suit."""
    for key, given in (
        ("budget_kb", quant.budget_kb is not None),
        ("max_drop", quant.max_drop is not None),
        ("progressive", bool(quant.progressive)),
    ):
        if given:
            raise UserError(
                f"params.yaml: quant.{key} changes the width of the item table, which pq stores by centroids; leave "
                f"quant.{key} empty for pq"
            )
    built = attach.build(model, quant, sys.modules[__name__], options)
    if not any(isinstance(quantizer, PQ) for quantizer in built.values()):
        raise UserError(
            "params.yaml: pq has no item table to compress: quant.preset: source, or 32 bits in quant.overrides, leaves it in "
            "full precision"
        )


def prepare(options: Options, store: Any, seed: int) -> Prepared:
    """store: the prepared data, of which `codes: svd` reads the training part."""
    assigned = svd_numbers(store, options.splits, options.centroids, seed) if options.codes == "svd" else None
    return Prepared(options, seed, assigned)


def build(place: Place, bits: int, per_row: bool, options: Options | Prepared) -> Quantizer | None:
    start = options if isinstance(options, Prepared) else Prepared(options)
    rest = start.options.rest
    module, chosen = attach.load_method("lsq" if rest == "none" else rest, None)
    if place.name not in TABLES:
        return None if rest == "none" else module.build(place, bits, per_row, chosen)
    rows, features = book_shape(place, start.options)
    book = Place(f"{place.name}/book", "table", True, features, rows, place.scoring)
    return PQ(place, bits, module.build(book, bits, False, chosen), start)


def binary(place: Place, bits: int, per_row: bool, options: Options | Prepared) -> Quantizer | None:
    """Of one bit: any other table as `rest` has it. Raises UserError for the item table."""
    if place.name in TABLES:
        raise UserError(
            f"params.yaml: the centroids of {place.name} take 2 to 8 bits, not 1; set quant.overrides for it, or another "
            "quant.embedding_bits"
        )
    rest = (options.options if isinstance(options, Prepared) else options).rest
    return None if rest == "none" else attach.build_one(place, bits, per_row, *attach.load_method(rest, None))


def book_shape(place: Place, options: Options) -> tuple[int, int]:
    """Rows (of all splits) and features of the centroids of a table. Raises UserError where there are none of that kind."""
    splits, centroids, items = options.splits, options.centroids, place.rows - 1
    if place.features % splits:
        divisors = [str(n) for n in range(1, place.features + 1) if place.features % n == 0]
        raise UserError(
            f"params.yaml: methods.pq.splits: {splits} does not divide the {place.features} features of {place.name}; set one "
            f"of {', '.join(divisors)}"
        )
    if items < centroids:
        raise UserError(
            f"params.yaml: methods.pq.centroids: {centroids} centroids a split are more than the {items} items of "
            f"{place.name}; set at most {items}, and far fewer for a smaller model"
        )
    return splits * centroids, place.features // splits


class PQ(Quantizer):
    """centroids: (splits * centroids, features / splits), those of the first split first. index: (rows, splits) which of them
    each row is made of; padding, the first row, has the number after the last, which stands for zeros."""

    index: Tensor

    def __init__(self, place: Place, bits: int, book: Quantizer, start: Prepared) -> None:
        """book: brings the centroids onto their grid."""
        super().__init__(place, bits, per_row=False)
        self.start, self.book = start, book
        rows, features = book_shape(place, start.options)
        self.centroids = nn.Parameter(torch.zeros(rows, features))
        self.register_buffer("index", torch.full((place.rows, start.options.splits), rows, dtype=torch.int32))

    @property
    def first(self) -> Tensor:
        """The row of the first centroid of each split."""
        count = self.start.options.centroids
        return torch.arange(0, len(self.centroids), count, dtype=torch.int32, device=self.index.device)

    def weights(self) -> list[nn.Parameter]:
        return [self.centroids]

    @torch.no_grad()
    def initialize(self, values: Tensor) -> None:
        """Numbers by k-means, or those assigned; centroids are the means of the trained parts of their items."""
        options, assigned = self.start.options, self.start.assigned
        if options.codes == "svd" and assigned is None:
            raise UserError("params.yaml: methods.pq.codes: svd takes the training interactions; use sasrec.quant.pq.prepare")
        # On the processor in float64: sums there have an order, and so the same bits every time.
        parts = values[1:].detach().cpu().double().chunk(options.splits, 1)
        for split, part in enumerate(parts):
            if assigned is None:
                generator = torch.Generator().manual_seed(self.start.seed + split)
                centroids, numbers = kmeans(part, options.centroids, options.iterations, generator)
            else:
                numbers = assigned[:, split].long()
                centroids = means(part, numbers, options.centroids)[0]
            begin = split * options.centroids
            self.centroids[begin : begin + options.centroids] = centroids.to(self.centroids)
            self.index[1:, split] = (numbers + begin).to(self.index)
        self.book.initialize(self.centroids)

    def renew(self, values: Tensor) -> None:
        """Of the centroids' grid alone: they are what is trained, and the table that they began with is not."""
        self.book.renew(self.centroids.detach())

    def forward(self, x: Tensor, rows: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        book = F.pad(self.book(self.centroids), (0, 0, 0, 1))
        index = self.index if rows is None else self.index[rows]
        return F.embedding(index, book).flatten(-2).to(x.dtype)

    def grid(self, values: Tensor | None = None) -> Grid:
        return self.book.grid(self.centroids)

    def product(self) -> Product:
        book = self.book.codes(self.centroids).view(len(self.first), self.start.options.centroids, -1)
        return Product(book, (self.index[1:] - self.first).to(torch.uint8))

    def codes(self, values: Tensor) -> Tensor:
        return self.product().codes(self.grid())

    def refresh(self, values: Tensor) -> None:
        self.book.refresh(self.centroids.detach())

    def start_epoch(self, epoch: int, epochs: int, seed: int, before: int = 0) -> None:
        self.book.stochastic = self.stochastic
        self.book.start_epoch(epoch, epochs, seed, before)


def means(rows: Tensor, numbers: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The mean of the rows of each number, zeros where there are none, and how many each has. rows: (n, features), numbers:
    (n,); returns (count, features) and (count,)."""
    sizes = torch.bincount(numbers, minlength=count)
    sums = rows.new_zeros(count, rows.shape[1]).index_add_(0, numbers, rows)
    return sums / sizes.clamp_min(1)[:, None], sizes


def nearest(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """The number of the centroid nearest to each row, the first of equals, and the squared distance from it, (n,) each."""
    norms = centroids.square().sum(1)
    found = [(norms - 2 * part @ centroids.T).min(1) for part in rows.split(ROWS_AT_ONCE)]
    rest = torch.cat([part.values for part in found])
    return torch.cat([part.indices for part in found]), (rest + rows.square().sum(1)).clamp_min_(0)


def spread(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` of the rows, each drawn with a probability of its squared distance from those drawn before: k-means++ (Arthur
    and Vassilvitskii, SODA 2007)."""
    chosen = [int(torch.randint(len(rows), (1,), generator=generator))]
    distances = (rows - rows[chosen[0]]).square().sum(1)
    while len(chosen) < count:
        shares = distances.cumsum(0)
        drawn = torch.rand(1, generator=generator, dtype=shares.dtype) * shares[-1]
        # Where all rows are drawn already, equal ones among them, the last one again.
        chosen.append(min(int(torch.searchsorted(shares, drawn, right=True)), len(rows) - 1))
        distances = distances.minimum((rows - rows[chosen[-1]]).square().sum(1))
    return rows[chosen]


def kmeans(rows: Tensor, count: int, iterations: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Lloyd's iterations from k-means++ until nothing moves, `iterations` at most. A centroid that is nearest to no row goes
    to one of the rows farthest from theirs.

    rows: (n, features) float64, at least `count` of them, equal ones or not. Returns centroids (count, features), and the
    number of the nearest of each row, (n,).
    """
    centroids = spread(rows, count, generator)
    for _ in range(iterations):
        numbers, distances = nearest(rows, centroids)
        moved, sizes = means(rows, numbers, count)
        empty = sizes == 0
        moved[empty] = rows[distances.topk(int(empty.sum())).indices]
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids, nearest(rows, centroids)[0]


def svd_numbers(store: Any, splits: int, centroids: int, seed: int) -> Tensor:
    """Numbers of centroids as RecJPQ assigns them: the i-th of an item is the quantile, of `centroids`, of its
    i-th component in the truncated SVD of the matrix of users and items. Returns (items, splits) int64.

    Raises UserError where the data has fewer users or items than components.
    """
    users = np.repeat(np.arange(len(store.train_ends)), store.train_ends - np.asarray(store.offsets)[:-1])
    places = users, np.asarray(store.items)[training_part(store.offsets, store.train_ends)] - 1
    shape = len(store.train_ends), int(store.items_count)
    if splits > min(shape):
        raise UserError(
            f"params.yaml: methods.pq.splits: an SVD of {shape[0]} users and {shape[1]} items has fewer than {splits} "
            "components; set fewer splits, or methods.pq.codes: kmeans"
        )
    matrix = sparse.csr_matrix((np.ones(len(places[0])), places), shape)
    rng = np.random.default_rng(seed)
    numbers = np.empty((shape[1], splits), np.int64)
    for split, component in enumerate(right_vectors(matrix, splits, rng)):
        width = max(float(np.ptp(component)), np.finfo(float).tiny)
        noisy = (component - component.min()) / width + NOISE * rng.standard_normal(shape[1])
        numbers[np.argsort(noisy, kind="stable"), split] = np.arange(shape[1]) * centroids // shape[1]
    return torch.from_numpy(numbers)


def right_vectors(matrix: sparse.csr_matrix, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """The right singular vectors of the largest singular values, (count, columns), the largest first: a randomized SVD
    (Halko, Martinsson and Tropp, SIAM Review 53, 2011). The same bits every time, also where singular values are equal."""
    wide = min(count + OVERSAMPLED, *matrix.shape)
    basis = np.linalg.qr(rng.standard_normal((matrix.shape[1], wide)))[0]
    for _ in range(POWERS):
        basis = np.linalg.qr(matrix.T @ np.linalg.qr(matrix @ basis)[0])[0]
    _, _, turned = np.linalg.svd(matrix @ basis, full_matrices=False)
    return np.asarray((turned @ basis.T)[:count])
