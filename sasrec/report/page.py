"""The report as one self-contained HTML page: no network, no scripts, figures inside, readable on a phone."""

import base64
from collections.abc import Mapping
from html import escape
from string import Template
from typing import Any

from sasrec.config import QuantParams
from sasrec.quant.conventions import Kind, convention, is_quantized
from sasrec.report import markup
from sasrec.report.findings import answer, details, width_text
from sasrec.report.results import Results, Variant
from sasrec.report.sensitivity import Sensitivity
from sasrec.report.shipping import section
from sasrec.report.tables import MINUS, percent_text

PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root {
  --ink: #1b1f24; --soft: #57606a; --paper: #ffffff; --panel: #f5f7f9; --line: #d5dbe1; --accent: #0072b2;
  --good: #006b4f; --bad: #a83f00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e8ebee; --soft: #a3adb8; --paper: #14181d; --panel: #1d232a; --line: #39424c; --accent: #6cb8ea;
    --good: #5fd0ab; --bad: #ff9e66;
  }
  /* The drawings are dark on white: turn lightness over and keep the hues. */
  figure img { filter: invert(0.91) hue-rotate(180deg); mix-blend-mode: lighten; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; }
main { max-width: 74rem; margin: 0 auto; padding: 1.25rem 1rem 3rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0 0.25rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0.5rem; padding-top: 0.75rem; border-top: 1px solid var(--line); }
p, figcaption, li { max-width: 44rem; }
.data, caption, figcaption, .note { color: var(--soft); }
.data { margin-top: 0; }
.answer { background: var(--panel); border-left: 4px solid var(--accent); border-radius: 0 6px 6px 0;
  padding: 0.9rem 1.1rem; font-size: 1.08rem; max-width: 48rem; }
.scroll { overflow-x: auto; margin: 1rem 0; border: 1px solid var(--line); border-radius: 6px; }
.scroll:focus-visible { outline: 3px solid var(--accent); }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 0.6rem; font-size: 0.9rem; }
caption span { display: block; position: sticky; left: 0.6rem; width: min(44rem, 100vw - 4rem); }
th, td { padding: 0.4rem 0.6rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
thead th { background: var(--panel); vertical-align: bottom; white-space: normal; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--panel); }
td.text { text-align: left; }
.card th { font-weight: 600; }
.card thead { display: none; }
.card th { white-space: normal; }
.card td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
td small { display: block; color: var(--soft); font-size: 0.82rem; }
.better { color: var(--good); font-weight: 600; }
.worse { color: var(--bad); font-weight: 600; }
tr.chosen th::after { content: " ★"; color: var(--accent); }
figure { margin: 1.5rem 0; }
figure img { width: 100%; max-width: 40rem; height: auto; display: block; border-radius: 6px; }
figcaption { margin-top: 0.5rem; font-size: 0.95rem; }
pre { background: var(--panel); padding: 0.8rem 1rem; border-radius: 6px; overflow-x: auto; font-size: 0.88rem; }
@media (min-width: 70rem) {
  figure { display: grid; grid-template-columns: 40rem minmax(16rem, 26rem); gap: 2rem; align-items: start; }
  figcaption { margin-top: 1rem; }
}
@media print { .scroll { overflow: visible; border: 0; } }
</style>
</head>
<body>
<main>
<header>
<h1>$title</h1>
<p class="data">$data</p>
</header>
<section aria-label="Answer">
<p class="answer">$answer</p>
$details
</section>
<section>
<h2>Results</h2>
$results
$notes
</section>
<section>
<h2>Quality</h2>
$quality
</section>
<section>
<h2>Size</h2>
$sizes
<p>$agreement</p>
$size
</section>
<section>
<h2>Sensitivity</h2>
$sensitivity
$mixed
</section>
<section>
<h2>Latency</h2>
$latency
$shipping
</section>
<section>
<h2>Training</h2>
$curves
</section>
<section>
<h2>What the numbers mean</h2>
$card
$levels
<p class="note">HR@k: share of users whose held-out item is among the first k. NDCG@k: 1 / log2(rank + 1) where it is,
else 0. MRR: mean of 1 / rank. The other numbers of every variant are in metrics/ and in plots/summary.csv.</p>
</section>
<section>
<h2>How to get this again</h2>
<p>Everything on this page comes from the files of the project, without a clock and without chance that is not seeded
(the latencies alone depend on the machine):</p>
<pre><code># all that is not up to date
dvc repro
# the same study at another width
dvc exp run -S quant.bits=4
# what changed, in numbers and in figures
dvc metrics diff
dvc plots diff</code></pre>
</section>
</main>
</body>
</html>
""")

CAPTIONS = {
    "quality": "Above: NDCG@10 of every variant on the test items; each interval resamples users (and seeds). Below: the same "
    "users compared one by one with the reference of each variant, where what is hard for every model cancels out, "
    "so the intervals are much narrower. A hollow mark is a difference within noise: its interval includes 0.",
    "size": "NDCG@10 against the bytes of the exported files, scales and manifest included. Variants of about the "
    "same size stand side by side, the best first. The baselines are left out.",
    "sensitivity": "Rise of the validation loss when one tensor of the trained model is rounded, after training, and all "
    "others stay in full precision. What is high here is where a narrow width costs most.",
    "latency": "Median time of the exported models on this machine, run by their own runtime, from full histories to the ten "
    "best of all items. Quantized ones multiply integers. The tables below have the numbers.",
    "curves": "Training and validation loss above, NDCG@10 on validation below, by epoch. Epoch 0 is the state right "
    "after the quantizers were put in place. The best epoch on validation is the one that is kept. Fine-tuned variants "
    "share the scale of NDCG@10. Variants without training are not shown.",
}


def render(
    results: Results,
    stats: Mapping[str, Any],
    quant: QuantParams,
    figures: Mapping[str, bytes],
    chosen: str | None = None,
    methods: Mapping[str, Mapping[str, Any]] | None = None,
    sensitivity: Sensitivity | None = None,
) -> str:
    """The page. stats: data/prepared/stats.json. figures: PNG by name (as in CAPTIONS). chosen: the marked variant. methods:
    the options of each method. sensitivity: of each tensor, and mixed widths."""
    drawings = {name: _figure(name, figures[name], results) for name in CAPTIONS}
    return PAGE.substitute(
        title=f"Quantized sequential recommenders on {escape(str(stats['dataset']))}",
        data=markup.text(_data(stats, results, quant)),
        answer=markup.text(answer(results, quant)).replace(f"choose {chosen}:", f"choose <strong>{chosen}</strong>:"),
        details="\n".join(f"<p>{markup.text(paragraph)}</p>" for paragraph in details(results, quant)),
        results=_results(results, chosen),
        shipping=section([variant.name for variant in results.of_kind("model", "control", "method")]),
        notes="\n".join(f'<p class="note">{markup.text(note)}</p>' for note in results.notes),
        sizes=_sizes(results, quant),
        agreement=markup.text(results.agreement),
        card=_card(results.variants[-1]),
        levels=_levels(results, quant, methods or {}),
        mixed=_mixed(sensitivity) if sensitivity else "",
        **drawings,
    )


def _data(stats: Mapping[str, Any], results: Results, quant: QuantParams) -> str:
    length = stats.get("length")
    median = f", {length['median']:g} a user in the median" if isinstance(length, Mapping) and "median" in length else ""
    return (
        f"{stats['users']:,} users, {stats['items']:,} items, {stats['interactions']:,} interactions{median}. "
        f"{results.variants[-1].metrics['users']:,} users evaluated."
        + (f" Quantized: {quant.model}, at {width_text(quant)}." if results.of_kind("method") else "")
    )


def _figure(name: str, png: bytes, results: Results) -> str:
    names = ", ".join(variant.name for variant in results.variants)
    alts = {
        "quality": f"NDCG@10 with intervals, and differences from the reference, of {names}; the numbers are in the "
        "table Results.",
        "size": "NDCG@10 against size in bytes of each variant; the numbers are in the tables Results and Sizes.",
        "sensitivity": "Bars of the rise of the validation loss for each tensor, alone at 4 and at 2 bits.",
        "latency": "Bars of milliseconds a batch of each variant, for encoding and scoring, at each batch size.",
        "curves": "Curves of loss and validation NDCG@10 by epoch for each variant that was trained.",
    }
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))  # of the PNG header
    image = base64.b64encode(png).decode()
    return (
        f'<figure>\n<img width="{width}" height="{height}" alt="{escape(alts[name])}" '
        f'src="data:image/png;base64,{image}">\n'
        f"<figcaption>{markup.text(CAPTIONS[name])}</figcaption>\n</figure>"
    )


def _results(results: Results, chosen: str | None) -> str:
    rows = []
    references = {variant.reference for variant in results.variants}
    for variant in results.variants:
        values, own = variant.metrics, results.own(variant)
        change, rank, verdict = "", "", "reference" if variant.name in references else ""
        if own:
            low, high = (percent_text(own.percent(value), MINUS) for value in (own.low, own.high))
            change = f"{percent_text(own.relative, MINUS)}<small>{low} to {high}</small>"
            rank = f"{own.log2_rank:+.3f}<small>{own.log2_rank_low:+.3f} to {own.log2_rank_high:+.3f}</small>"
            rank = rank.replace("-", MINUS)
            style, than = (own.verdict, "than") if own.verdict != "within noise" else ("noise", "of")
            verdict = f'<span class="{style}">{own.verdict}</span><small>{than} {escape(own.reference)}</small>'
        cells = [
            f"{values['bits']:g}",
            f"{values['ndcg@10']:.4f}<small>{values['ndcg@10_low']:.4f} to {values['ndcg@10_high']:.4f}</small>"
            + _deviation(values),
            change,
        ]
        after = [
            rank, f"{values['hr@10']:.4f}", f"{values['mrr']:.4f}", f"{100 * values['coverage@10']:.1f}&nbsp;%",
            f"{values['sampled_ndcg@10']:.4f}", f"{values['sampled_hr@10']:.4f}",
        ]  # fmt: skip
        mark = ' class="chosen"' if variant.name == chosen else ""
        rows.append(
            f'<tr{mark}><th scope="row">{escape(variant.name)}</th>' + "".join(f"<td>{cell}</td>" for cell in cells)
            + f'<td class="text">{verdict}</td>' + "".join(f"<td>{cell}</td>" for cell in after) + "</tr>"
        )  # fmt: skip
    header = (
        "Variant", "Bits", "NDCG@10", "Change", "Verdict", "log2 rank", "HR@10", "MRR", "Coverage@10",
        "Sampled NDCG@10", "Sampled HR@10",
    )  # fmt: skip
    caption = (
        "Means over the test items of all users (and over seeds, where ± gives their standard deviation), with 95 % "
        "intervals. Change: NDCG@10 against the reference that the "
        "verdict names, user by user. log2 rank: mean change of the rank's logarithm, below 0 is better. Sampled: "
        "ranked against the sampled candidates only." + (" ★ marks the choice." if chosen else "")
    )
    return markup.table("Results", caption, header, rows)


def _deviation(values: Mapping[str, Any]) -> str:
    """The spread over seeds, where there are several."""
    if values["ndcg@10_std"] is None:
        return ""
    return f"<small>± {values['ndcg@10_std']:.4f} over {values['seeds']} seeds</small>"


def _sizes(results: Results, quant: QuantParams) -> str:
    source = results.get(quant.model)
    rows = []
    for variant in results.of_kind("model", "control", "method"):
        values = variant.metrics
        times = f"{source.metrics['bytes'] / values['bytes']:.2f}" if source else ""
        cells = [
            f"{values['bytes']:,}",
            times,
            f"{values['embedding_bytes']:,}",
            f"{values['weight_bytes']:,}",
            f"{values['bits']:g}",
        ]
        rows.append(markup.row([variant.name, *cells]))
    header = ("Variant", "Bytes", f"Times smaller than {quant.model}", "Embeddings", "Weight matrices", "Bits")
    caption = (
        "Bytes on disk of the exported model; of them embedding tables and weight matrices, with their scales. Bits: "
        "mean width."
    )
    return markup.table("Sizes", caption, header, rows)


def _mixed(found: Sensitivity) -> str:
    """Mixed widths beside the uniform ones."""
    names = {"budget": "mixed, no more bytes", "same loss": "mixed, no more loss"}
    rows = []
    for each in found.assignments:
        bits = f"{each.bits} bits"
        name = bits if each.name == "uniform" else f"{names[each.name]} than {bits}"
        cells = [f"{each.size:,}", f"{each.rise:+.4f}".replace("-", MINUS)]
        cells_text = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row">{markup.text(name)}</th>{cells_text}<td class="text">{escape(each.widths)}</td></tr>')
    caption = (
        "All weights and tables rounded after training, activations at 8 bits: uniform widths, and those that quant.budget_kb "
        f"and quant.max_drop choose by the figure above. Loss: rise over full precision ({found.full:.4f} nats) on validation."
    )
    return markup.table("Mixed widths", caption, ("Widths", "Bytes of weights and tables", "Loss", "Tensors at bits"), rows)


def _levels(results: Results, quant: QuantParams, methods: Mapping[str, Mapping[str, Any]]) -> str:
    """How many values a tensor of each kind may take, method by method."""
    kinds: dict[Kind, int | None] = {
        "weight": quant.weight_bits, "table": quant.embedding_bits, "activation": quant.activation_bits,
    }  # fmt: skip
    rows = []
    for variant in results.of_kind("method"):
        cells = []
        for kind, own in kinds.items():
            if not is_quantized(variant.name, kind, methods.get(variant.name)):
                cells.append("full precision")
                continue
            both = [
                convention(variant.name, own or quant.bits, kind, methods.get(variant.name), signed) for signed in (True, False)
            ]
            # Of weights and tables, which are all signed, the second is the same.
            count = " or ".join(str(levels) for levels in sorted({said.levels for said in both}))
            cells.append(f"{count}<small>{'0 among them' if both[0].zero else 'without 0'}</small>")
        cells_text = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row">{escape(variant.name)}</th>{cells_text}</tr>')
    if not rows:
        return ""
    caption = (
        "Values that a tensor may take, per scale, where the width of its kind holds (quant.overrides and quant.preset give "
        "single tensors other widths)."
    )
    return markup.table("Levels", caption, ("Method", "Weights", "Tables", "Activations"), rows)


def _card(variant: Variant) -> str:
    rows = [
        markup.row([str(key).replace("_", " "), _plain(value)])
        for key, value in [*variant.card.items(), ("short hash", variant.metrics["card"])]
    ]
    caption = "The protocol card: numbers from two studies compare only where all of this is the same."
    table = markup.table("Protocol card", caption, ("", "Protocol"), rows)
    return table.replace('class="scroll"', 'class="scroll card"', 1)


def _plain(value: Any) -> str:
    """A value of the card in words: mappings as `key value` pairs."""
    if isinstance(value, Mapping):
        return ", ".join(f"{str(key).replace('_', ' ')} {_plain(inner)}" for key, inner in value.items() if inner is not None)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
