"""Plain sentences computed from the results: what to choose, what it costs, and what that is compared with."""

from sasrec.config import BASELINES, QuantParams
from sasrec.report.results import UNTRAINED, Comparison, Results, Variant, best_method
from sasrec.report.tables import MINUS, listed, percent_text, size_text

BASELINE_WORDS = {
    "popularity": "popularity",
    "recent_popularity": "recent popularity",
    "markov": "first-order Markov",
    "item_knn": "item-kNN",
}


def width_text(quant: QuantParams) -> str:
    """The widths of the study in words: 8 bits, or each kind of tensor where they differ."""
    widths = {
        "weights": quant.weight_bits or quant.bits,
        "activations": quant.activation_bits or quant.bits,
        "embeddings": quant.embedding_bits or quant.bits,
    }
    if len(set(widths.values())) == 1:
        text = _bits(widths["weights"])
    else:
        text = listed([f"{_bits(bits)} for {kind}" for kind, bits in widths.items()])
    return text + (" (single tensors otherwise)" if quant.overrides else "")


def _bits(bits: int) -> str:
    return f"{bits} bit" if bits == 1 else f"{bits} bits"


def change_text(comparison: Comparison) -> str:
    """-1.2 % (95 % interval -2.0 % to -0.4 %)"""
    change, low, high = (
        percent_text(comparison.percent(value), MINUS) for value in (comparison.difference, comparison.low, comparison.high)
    )
    return f"{change} (95 % interval {low} to {high})"


def answer(results: Results, quant: QuantParams) -> str:
    """One paragraph: the method to choose at the study's width, how much smaller, and at what cost."""
    best = best_method(results.variants)
    if best is None:
        return "No quantized variant was measured in this study, so there is nothing to choose between."
    if not best.metrics["valid_ndcg@10"]:
        return "No quantized variant finds a single validation item, so there is nothing to choose: train for longer first."
    values = best.metrics
    others = len(results.of_kind("method"))
    ranked = (
        f"of {others} methods it has the highest NDCG@10 on validation ({values['valid_ndcg@10']:.4f})"
        if others > 1 else "it is the only method that was measured"
    )  # fmt: skip
    sentences = [f"At {width_text(quant)}, choose {best.name}: {ranked}."]
    source = results.get(quant.model)
    if source:
        ratio = source.metrics["bytes"] / values["bytes"]
        compared = f"{ratio:.1f} times smaller" if ratio >= 1 else f"{1 / ratio:.1f} times larger"
        sentences.append(
            f"The exported model takes {size_text(values['bytes'])}, {compared} than {source.name} in full precision "
            f"({size_text(source.metrics['bytes'])})."
        )
    own = results.own(best)
    if own:
        noise = {"within noise": "within noise", "better": "a gain beyond noise", "worse": "a loss beyond noise"}
        sentences.append(
            f"On the test items its NDCG@10 is {values['ndcg@10']:.4f}: {change_text(own)} against "
            f"{_described(own.reference)}. That is {noise[own.verdict]}."
        )
    sentences += _against_ptq(best, results)
    sentences += _ties(best, results)
    return " ".join(sentences)


def _described(reference: str) -> str:
    return "the control, which trained for as long in full precision" if reference == "control" else reference


def _against_ptq(best: Variant, results: Results) -> list[str]:
    """Whether what the chosen method does beyond plain rounding pays."""
    comparison = results.comparisons.get((best.name, "ptq"))
    if comparison is None:
        return []
    change = change_text(comparison)
    return {
        "within noise": [
            f"Plain post-training quantization (ptq) cannot be told apart from it: {best.name} against ptq is "
            f"{change}. ptq is the simpler choice here."
        ],
        "better": [f"It beats plain post-training quantization (ptq) by {change}."],
        "worse": [f"On the test items, though, it is below plain post-training quantization (ptq): {change}."],
    }[comparison.verdict]


def _ties(best: Variant, results: Results) -> list[str]:
    """Which of the other methods cannot be told apart from the chosen one on the test items, and which did better."""
    verdicts: dict[str, list[str]] = {}
    others = [variant.name for variant in results.of_kind("method") if variant.name not in (best.name, "ptq")]
    for name in others:
        comparison = results.comparisons.get((best.name, name))
        if comparison is not None:
            verdicts.setdefault(comparison.verdict, []).append(name)
    sentences = []
    if tied := verdicts.get("within noise"):
        sentences.append(f"Tied with {best.name}, as the intervals of their paired differences include 0: {listed(tied)}.")
    if ahead := verdicts.get("worse"):
        sentences.append(f"On the test items {listed(ahead)} did better than {best.name}, beyond noise.")
    return sentences


def details(results: Results, quant: QuantParams) -> list[str]:
    """Further paragraphs: methods against ptq, the control, and sequential models against the baselines."""
    paragraphs = [_methods(results), _control(results, quant), *_models(results)]
    return [paragraph for paragraph in paragraphs if paragraph]


def _methods(results: Results) -> str:
    sentences = []
    trained = [variant.name for variant in results.of_kind("method") if variant.name not in UNTRAINED]
    groups: dict[str, list[str]] = {}
    for name in trained:
        comparison = results.comparisons.get((name, "ptq"))
        if comparison:
            change = percent_text(comparison.relative, MINUS)
            groups.setdefault(comparison.verdict, []).append(f"{name} ({change})")
    words = {"better": "better than ptq", "within noise": "within noise of ptq", "worse": "worse than ptq"}
    parts = [f"{words[verdict]}: {listed(groups[verdict])}" for verdict in words if verdict in groups]
    if parts:
        sentences.append(f"Of the methods that train, {'; '.join(parts)}.")
    if "worse" in groups:
        sentences.append(
            "A method that trains and still ends below ptq at the same width points to a mistake or to too little training."
        )
    return " ".join(sentences)


def _control(results: Results, quant: QuantParams) -> str:
    control = results.get("control")
    own = results.own(control) if control else None
    if own is None:
        return ""
    noise = "within" if own.verdict == "within noise" else "beyond"
    what = "The control shows what training on does by itself"
    if quant.from_scratch:
        what = "The control is trained from scratch by the code that trains the quantized variants, without quantizers"
    sentences = [f"{what}: {change_text(own)} against {quant.model}, {noise} noise."]
    trained = [variant.name for variant in results.of_kind("method") if variant.reference == "control"]
    untrained = [variant.name for variant in results.of_kind("method") if variant.reference == quant.model]
    if trained:
        sentences.append(f"{listed(trained)} are compared with the control.")
    if untrained:
        sentences.append(f"{listed(untrained)} are compared with {quant.model}, from which they start.")
    return " ".join(sentences)


def _models(results: Results) -> list[str]:
    sentences = []
    for model in results.of_kind("model"):
        parts = []
        for name in BASELINES:
            comparison = results.comparisons.get((model.name, name))
            if comparison is None:
                continue
            times = f"{model.metrics['ndcg@10'] / comparison.base:.1f} times " if comparison.base else "(against 0) "
            interval = f"{comparison.difference:+.4f}, 95 % interval {comparison.low:+.4f} to {comparison.high:+.4f}"
            noise = ", within noise" if comparison.verdict == "within noise" else ""
            parts.append(f"{times}that of {BASELINE_WORDS[name]} ({interval.replace('-', MINUS)}{noise})")
        if parts:
            sentences.append(f"{model.name} reaches NDCG@10 {model.metrics['ndcg@10']:.4f}, {listed(parts)}.")
    return sentences
