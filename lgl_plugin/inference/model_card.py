"""Writes the model card of an exported encoder, in the form of Hugging Face.

Its reader has only the folder. The card names no paths of the machine that
trained the model: of a path it keeps only the last name.
"""

import html
import pathlib
import re
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from lgl_plugin.runs.differences import flatten
from lgl_plugin.runs.metrics_log import TRUE_LABELS, cells, columns, row_name
from lgl_plugin.runs.run import is_ceiling, round_of
from lgl_plugin.utils.tables import markdown_table

SPEED = ("utterances_per_second", "seconds")  # figures left out of the card
TAGS = [
    "speechbrain",
    "speaker-verification",
    "speaker-embeddings",
    "self-supervised",
    "loss-gated-learning",
]


def model_card(
    settings: dict[str, dict],
    encoder: str,
    step: str = "",
    n_classes: int = 0,
    decision: tuple[float, str] | None = None,
    data: dict | None = None,
    rows: dict[str, dict] | None = None,
    licence: str = "other",
    backend: bool = False,
    package: str = "",
) -> str:
    """Returns the card of an encoder from a step, such as "iter2/gated".

    `encoder` is its class. `settings` are those of the stages that trained the
    model, by "stage 1" and "stage 2". `decision` is the threshold and its
    source: "pseudo-labels", "halves" or "given". `data` has the training set's
    "name", "utterances", "held_out" and "hours", and `rows` the figures of
    `summarise`. `package` is the package that the folder needs beside
    SpeechBrain.
    """
    stage, chosen = max(settings.items())
    given = chosen.get("labels_file")
    ceiling = is_ceiling(step)
    how = "with few" if given else "without"
    title = f"Speaker encoder trained {'with all' if ceiling else how} labels"
    rows, own = _rows_until(rows or {}, step)
    trials = last_name(chosen.get("verification_file") or "")
    shown = {k: c for k, c in columns([rows]).items() if k not in SPEED}
    header, body = cells([rows], shown)
    body = [
        [f"**{name}**" if name == own else name, *rest] for name, *rest in body
    ]
    return _render(
        "model_card.md",
        _metadata(
            title,
            TAGS[:3] if ceiling else TAGS,
            *(rows.get(own, {}), trials, licence, backend),
        ),
        title=title,
        given=given,
        ceiling=ceiling,
        encoder=encoder,
        rate=chosen["sample_rate"],
        decision=decision,
        backend=backend,
        package=package,
        data=data,
        data_name=_code(data["name"]) if data else "",
        stage=stage,
        method=_class(chosen, "method"),
        gate=_class(chosen, "gate"),
        log_mels=bool(chosen.get("log_mel_share")),
        iteration=round_of(step),
        n_classes=n_classes,
        results=_table(header, body) if len(header) > 1 else "",
        scored=own in rows,
        trials=_code(trials) if trials else "",
        agreement=bool({"NMI", "AMI"} & {*header}),
        label_free="pseudo-EER %" in header,
        settings=[
            (
                name.replace("stage 1", "Stage I").replace(
                    "stage 2", "Stage II"
                ),
                _table(["setting", "value"], flatten(_without_paths(values))),
            )
            for name, values in settings.items()
        ],
        licence=_code(licence),
    )


def adapted_card(
    facts: dict[str, Any],
    rungs: tuple[list[str], list[list[str]]],
    source: str,
    data: str,
    licence: str = "other",
) -> str:
    """Returns the card of an encoder that was adapted to unlabelled audio.

    `facts` are values of the template that need no escaping. `rungs` are header
    and rows of the table of rungs. `source` names the given encoder, `data` the
    audio.
    """
    few = facts["given"] and facts["trained"]
    how = "with few labels" if few else "without labels"
    title = f"Speaker encoder adapted {how}"
    return _render(
        "adapted_card.md",
        _tagged(licence, [*TAGS[:3], "domain-adaptation"]),
        title=title,
        source=_code(last_name(source)),
        data=_code(last_name(data)),
        rungs=_table(*rungs),
        licence=_code(licence),
        **facts,
    )


def pretrained_card(
    facts: dict[str, Any], source: str, licence: str = "other"
) -> str:
    """Returns the card of a given encoder that is exported unchanged.

    `facts` are values of the template that need no escaping; `source` names the
    file.
    """
    return _render(
        "pretrained_card.md",
        _tagged(licence, TAGS[:3]),
        source=_code(last_name(source)),
        licence=_code(licence),
        **facts,
    )


def last_name(text: str) -> str:
    """Returns the last part of a path; a text that is no path stays."""
    # Windows' rules have both separators: a run may have moved between systems.
    return pathlib.PureWindowsPath(text).name


def _render(template, metadata, /, **facts):
    """Renders a card from a template in this folder."""
    # huggingface_hub renders without autoescape: `_code` and `_table` escape
    # a run's texts, which could otherwise change the card's structure.
    path = pathlib.Path(__file__).with_name(template)
    card = ModelCard.from_template(metadata, template_path=str(path), **facts)
    return f"{card}\n"


def _tagged(licence, tags):
    """Returns the YAML front matter, which the Hugging Face Hub reads."""
    return ModelCardData(license=licence, library_name="speechbrain", tags=tags)


def _metadata(title, tags, figures, trials, licence, backend):
    """Returns the front matter, with the error rate if there is one."""
    data = _tagged(licence, tags)
    rate = figures.get("eer_backend" if backend else "eer")
    if rate is not None:
        data.metrics = ["eer"]
        data.model_name = title
        data.eval_results = [
            EvalResult(
                task_type="speaker-verification",
                dataset_type="trial-list",
                dataset_name=trials,
                metric_type="eer",
                metric_name="EER %",
                metric_value=round(rate, 4),
            )
        ]
    return data


def _rows_until(rows, step):
    """Returns a run's rows up to that of a step, and that row's name."""
    place, *phase = re.sub(r"/average\d+$", "", step).split("/")
    record = {"stage": 1, "phase": place}
    if number := round_of(step):
        record = {"stage": 2, "iteration": number, "phase": "/".join(phase)}
    elif is_ceiling(step):
        record = {"stage": 0, "phase": TRUE_LABELS}
    own = row_name(record)
    if own in rows:
        names = list(rows)
        rows = {name: rows[name] for name in names[: names.index(own) + 1]}
    # An average of epochs has no row: it was not scored.
    return rows, own if step == "/".join([place, *phase]) else ""


def _class(settings, name):
    """Returns the name of the class that a setting makes an object of."""
    tag = next(iter(settings.get(name) or ()), "")
    return _code(tag.rpartition(".")[2]) if tag else ""


def _without_paths(value: Any) -> Any:
    """Returns nested settings with `last_name` applied to every text."""
    if isinstance(value, dict):
        return {key: _without_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_paths(part) for part in value]
    return last_name(value) if isinstance(value, str) else value


def _code(text):
    """Returns text as Markdown's inline code, which the text cannot end."""
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"


def _table(header, rows):
    """Returns a table whose cells are escaped: no HTML, link or new cell."""

    def escape(cell):
        text = html.escape(" ".join(cell.split()), quote=False)
        return re.sub(r"[\\|`]|(?<=\])\(", r"\\\g<0>", text)

    return markdown_table(header, [map(escape, row) for row in rows])
