"""The model card: README.md of the model folder, with the same bytes for the same recipe and result."""

import re

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from . import content, gfm, markdown
from .schema import MetricName, Report
from .share import shareable

PIPELINES = {
    "causal-lm": "text-generation",
    "masked-lm": "fill-mask",
    "sequence-classification": "text-classification",
    "token-classification": "token-classification",
    "image-classification": "image-classification",
    "speech-seq2seq": "automatic-speech-recognition",
    "seq2seq-lm": "text2text-generation",
    "feature-extraction": "feature-extraction",
}
"""The Hub's names of the tasks."""

CLASSES = {
    "causal-lm": ("AutoModelForCausalLM", "AutoTokenizer"),
    "masked-lm": ("AutoModelForMaskedLM", "AutoTokenizer"),
    "sequence-classification": ("AutoModelForSequenceClassification", "AutoTokenizer"),
    "token-classification": ("AutoModelForTokenClassification", "AutoTokenizer"),
    "image-classification": ("AutoModelForImageClassification", "AutoImageProcessor"),
    "speech-seq2seq": ("AutoModelForSpeechSeq2Seq", "AutoProcessor"),
    "seq2seq-lm": ("AutoModelForSeq2SeqLM", "AutoTokenizer"),
    "feature-extraction": ("AutoModel", "AutoTokenizer"),
}
METRIC_TYPES: dict[MetricName, str] = {"token_perplexity": "perplexity", "kl": "kl_divergence"}
FOLDER = "path/to/this/folder"


def model_card(report: Report) -> str:
    """The card's text. It has no time, date or path, which would differ between two runs of one recipe."""
    header = _header(report).to_yaml()
    sections = [
        f"# {gfm.code(content.short_id(report.model.id))}, compressed by low rank",
        _description(report),
        _loading(report),
        _results(report),
        _tasks(report),
        _replacement(report),
        f"## Recipe\n\n{gfm.fence(markdown.recipe_text(shareable(report)), 'yaml')}",
    ]
    body = "\n\n".join(section for section in sections if section)
    return str(ModelCard(f"---\n{header}\n---\n\n{body}\n", ignore_metadata_errors=False))


def _header(report: Report) -> ModelCardData:
    model, results = report.model, _evaluations(report)
    licences = model.license.split(", ") if model.license else [None]
    base = {}
    if _on_hub(report):
        # The Hub knows adapter, finetune, merge and quantized; the last is the same model in fewer bytes.
        base = {
            "base_model": model.id,
            "base_model_revision": model.revision,
            "base_model_relation": "quantized",
        }
    return ModelCardData(
        library_name="transformers",
        license=licences if len(licences) > 1 else licences[0],  # type: ignore[arg-type]  the Hub takes lists
        pipeline_tag=PIPELINES.get(model.task),
        tags=["lrcompress", "low-rank", "compression"],
        model_name=f"{content.last_part(model.id)}-lrcompress" if results else None,
        eval_results=results or None,
        **base,
    )


def _evaluations(report: Report) -> list[EvalResult]:
    row, data = content.result_row(report), report.recipe.get("data")
    test = data.get("test") if isinstance(data, dict) else None
    source = str(test.get("path")) if isinstance(test, dict) and test.get("path") else "held-out texts"
    name = content.short_id(source)
    measured = [
        EvalResult(
            task_type=PIPELINES.get(report.model.task, report.model.task),
            dataset_type=name,
            dataset_name=name,
            metric_type=METRIC_TYPES.get(metric, metric),
            metric_name=content.METRICS[metric],
            metric_value=float(f"{found.value:.6g}"),
        )
        for metric, found in (row.metrics if row else {}).items()
    ]
    return [*measured, *_task_evaluations(report)]


def _task_evaluations(report: Report) -> list[EvalResult]:
    row = content.result_row(report)
    found = row.tasks if row else {}
    return [
        EvalResult(
            task_type=PIPELINES.get(report.model.task, report.model.task),
            dataset_type=name.partition(".")[0],
            dataset_name=name.partition(".")[0],
            metric_type=name.partition(".")[2],
            metric_name=name,
            metric_value=float(f"{one.value:.6g}"),
        )
        for name, one in found.items()
    ]


def _description(report: Report) -> str:
    model, row = report.model, content.result_row(report)
    origin = f"[{gfm.prose(model.id)}](https://huggingface.co/{model.id})" if _on_hub(report) else ""
    origin = origin or gfm.code(content.short_id(model.id))
    at = f" at revision {gfm.code(model.revision)}" if _on_hub(report) and model.revision else ""
    sentences = [
        f"A smaller version of {origin}{at}: "
        "linear layers are replaced by two factors, `y = B (A x) + bias`, made by lrcompress.",
        gfm.prose(content.result_sentence(report)),
        _how(report) if row else "",
        _ranks(report),
    ]
    return "\n\n".join(sentence for sentence in sentences if sentence)


def _how(report: Report) -> str:
    """Where the factors come from, and whether they were trained."""
    row, method, recovery = (
        content.result_row(report),
        report.recipe.get("method"),
        report.recipe.get("recovery"),
    )
    kind = method.get("kind") if isinstance(method, dict) else None
    by_lora = isinstance(recovery, dict) and recovery.get("start") == "lora"
    start = f"The factors come from {gfm.code(str(kind))}, in closed form" if kind else "The factors are low-rank"
    if row is not None and "refit" in (row.name, row.start):
        start += ", solved again layer by layer for the compressed model's own inputs"
    if row is None or row.name != "lora_lrd":
        return f"{start}, without training."
    if not row.trained_steps:
        return f"{start}. A training of them did not help on validation data, and was dropped."
    start = "The factors start as a LoRA pair, random and zero" if by_lora else start
    tau = recovery.get("tau") if isinstance(recovery, dict) else None
    direct = isinstance(tau, dict) and tau.get("schedule") == "constant" and tau.get("start") == 1.0
    beside = "in the place of the dense weights (τ = 1)" if direct else "beside the dense weights (LoRA-LRD)"
    rounds = f", in {row.rounds} rounds from larger ranks to smaller ones" if row.rounds > 1 else ""
    return f"{start}. They were trained for {row.trained_steps:,} steps {beside}{rounds}."


def _ranks(report: Report) -> str:
    """How many layers were factorised, and between which ranks."""
    ranks = [layer.rank for layer in report.layers if layer.rank is not None]
    if not ranks:
        return ""
    dense = len(report.layers) - len(ranks)
    kept = f"; target layers that stay dense: {dense:,}" if dense else ""
    stored = " The factors are stored in 8 bits, with a scale for each output channel."
    eight = stored if report.recipe.get("dtype") == "int8" else ""
    return f"{len(ranks):,} layers are factorised, at ranks from {min(ranks):,} to {max(ranks):,}{kept}.{eight}"


def _loading(report: Report) -> str:
    model_class, processor = CLASSES[report.model.task]
    variable = "tokenizer" if processor == "AutoTokenizer" else "processor"
    snippet = "\n".join(
        [
            "import lrcompress",
            f"from transformers import {model_class}, {processor}",
            "",
            f'model = {model_class}.from_pretrained("{FOLDER}")',
            f'{variable} = {processor}.from_pretrained("{FOLDER}")',
        ]
    )
    reason = (
        "The first line is needed: it registers the loader of the factorised layers. Without it "
        "transformers only warns `Unknown quantization type` and leaves those layers at random values. Where "
        "lrcompress is not installed, `trust_remote_code=True` in place of that line runs "
        "`modeling_lrcompress.py`, which lies beside the weights."
    )
    return f"## Loading\n\n{gfm.fence(snippet, 'python')}\n\n{reason}"


def _results(report: Report) -> str:
    grid = content.quality_grid(report)
    covered = gfm.prose(content.counts_sentence(report))
    definitions = [
        f"- {gfm.prose(name)}: {gfm.prose(text)}"
        for name, text in report.definitions.items()
        if name in content.METRICS
    ]
    parts = [f"## Results\n\n{gfm.table(grid)}\n\n{markdown.WINNER} {covered}", "\n".join(definitions)]
    return "\n\n".join(part for part in parts if part) if grid else ""


def _tasks(report: Report) -> str:
    grid = content.task_grid(report)
    definitions = [
        f"- {gfm.prose(name)}: {gfm.prose(report.definitions[name])}"
        for name in content.task_names(report)
        if name in report.definitions
    ]
    parts = ["## Tasks of lm-eval", markdown.TASKS, gfm.table(grid), "\n".join(definitions)] if grid else []
    return "\n\n".join(part for part in parts if part)


def _replacement(report: Report) -> str:
    grid = content.replacement_grid(report)
    return f"## Before and after replacement\n\n{markdown.REPLACEMENT}\n\n{gfm.table(grid)}" if grid else ""


def _on_hub(report: Report) -> bool:
    """Only what came from the Hub has a commit; a relative folder can look like an id."""
    return report.model.revision is not None and bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", report.model.id))
