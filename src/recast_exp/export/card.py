"""The model card: what Hugging Face shows of a model."""

from __future__ import annotations

from typing import Any

import yaml  # type: ignore[import-untyped, unused-ignore]

from recast_exp.export._base import Facts

PAPER = "https://arxiv.org/abs/2411.16870"
SHOWN = 50  # classes that are listed


def model_card(facts: Facts, load: str, *, parameters: str = "") -> str:
    """The card in Markdown, with the front matter that Hugging Face reads.

    Args:
        facts: The facts about the model.
        load: Lines of Python that load it.
        parameters: What a task trains, in words.
    """
    config: dict[str, Any] = facts.task["config"]
    dataset = str(config.get("dataset", {}).get("name", ""))
    metrics: dict[str, float] = facts.task["metrics"]
    front: dict[str, Any] = {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm", "recast", "parameter-efficient-fine-tuning"],
    }
    if facts.licence:
        front["license"] = facts.licence
    if base := facts.origin.get("hf_hub_id"):
        front["base_model"] = base
    if dataset:
        front["datasets"] = [dataset]
    if metrics:
        front["metrics"] = ["accuracy"]
    header = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    method = config.get("model", {}).get("label") or config.get("model", {}).get("name") or "RECAST"
    adapter = str(config.get("adapter", {}).get("name", "none"))
    weights = facts.origin["fingerprint"].rpartition(":")[2][:16]
    rows = [
        ("Backbone", f"`{facts.origin['backbone']}`, weights {escaped(weights)}…"),
        ("Licence of its weights", facts.licence or "not known"),
        ("Method", escaped(str(method))),
        *([("Adapter", escaped(adapter))] if adapter != "none" else []),
        *([("Trained parameters", parameters)] if parameters else []),
        *([("Dataset", escaped(dataset))] if dataset else []),
        *[(f"{escaped(name)}", f"{100 * value:.1f} %") for name, value in metrics.items()],
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    names = [escaped(name) for name in facts.classes[:SHOWN]]
    more = f", and {len(facts.classes) - SHOWN} more" if len(facts.classes) > SHOWN else ""
    return (
        f"---\n{header}---\n\n# {escaped(str(method))} on {escaped(dataset) or 'a dataset of its own'}\n\n"
        f"An image classifier: `{facts.origin['backbone']}`, adapted with [RECAST]({PAPER}).\n\n"
        f"| | |\n|---|---|\n{table}\n\n## Use\n\n```python\n{load}```\n\n{facts.preprocessing()}\n\n"
        f"## Classes\n\n{len(facts.classes)}: {', '.join(names)}{more}.\n"
    )


def escaped(text: str) -> str:
    """A text whose letters mean nothing to Markdown or HTML."""
    clean = " ".join(text.split())
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]<>#|~" else letter for letter in clean).replace("&", "&amp;")
