"""The model card of an exported encoder, in the Hugging Face form.

It is for whoever gets the folder and nothing else. No path of the machine that
trained the model is in it: of a path the card keeps the last name.
"""

import html
import pathlib
import re
import textwrap

import yaml

from lgl_plugin.runs.metrics_log import cells
from lgl_plugin.runs.settings import flatten

FIGURES = ("eer", "min_dcf_001", "min_dcf_005", "nmi", "ami", "selected_share")
TITLE = "Speaker encoder trained without labels"

CARD = """\
---
{front}---

# {title}

{encoder} of [SpeechBrain](https://speechbrain.github.io), which alone loads
this folder. It turns speech at {rate} Hz into embeddings; those of one speaker
have a high cosine.

## How to use it

```python
{use}```

{decision}

## Data

{data}

## Method

{method}

## Results

{results}

## Settings

{settings}

## Licence

The code that trained this model is under Apache-2.0. That of the weights is
up to whoever publishes them and depends on the data: {licence}.
"""

USE = """\
from speechbrain.inference.speaker import SpeakerRecognition
model = SpeakerRecognition.from_hparams(source="path/of/this/folder")
first, second = (model.load_audio(f)[None] for f in ("1.wav", "2.wav"))
embedding = model.encode_batch(first)
score, same = model.verify_batch(first, second, threshold={threshold})
"""

DECISION = """
Accept two utterances as one speaker's above a cosine of **{threshold:.3f}**,
which `hyperparams.yaml` has as `threshold`; SpeechBrain's default of 0.25 is
another model's. {found}"""
UNDECIDED = """
No decision threshold was found for this model, and SpeechBrain's default of
0.25 is another model's: find one on pairs of your own."""

# Ways to find a threshold, with what benchmarks/thresholds.py says of them.
FOUND = {
    "pseudo-labels": """
It was found without labels, as the cosine at which misses and false alarms
are equally frequent: over pairs with an utterance that no gradient was taken
on, where the same pseudo-label stood for the same speaker. For 24 encoders of
six runs on two small corpora, it lay 0.05 (at most 0.10), mostly above, from
the one that labelled trials give, and the mean of both error rates was 0.8
points (at most 2.2) above their equal error rate.""",
    "halves": """
It was found without labels, as the cosine at which misses and false alarms
are equally frequent: over halves of utterances that no gradient was taken on,
where the same utterance stood for the same speaker. For six encoders on two
small corpora, it lay 0.04 (at most 0.11) from the one that labelled trials
give, and the mean of both error rates was 0.5 points (at most 1.7) above their
equal error rate.""",
    "given": "It was set by hand.",
}

STAGE1 = """
Stage I of loss-gated learning: two augmented crops of one utterance are drawn
together, those of different utterances apart (SimCLR), and an adversary that
tells how a crop was augmented is misled. Stage I knows no classes: the
`classifier` in `hyperparams.yaml` is there for SpeechBrain and has no
weights."""
STAGE2 = """
Stage II of loss-gated learning: again and again, utterances were clustered by
their embeddings into pseudo-speakers, and the encoder was trained to tell
these apart by an additive angular margin, first on all utterances, then on
those that a gate lets through: a high loss speaks of an unreliable
pseudo-label."""
CLASSES = """
This is iteration {iteration}, whose {n_classes:,} pseudo-speakers
`classifier.ckpt` tells apart; they have numbers and no names."""
PAPER = """
The method is that of *Self-supervised Speaker Recognition with Loss-gated
Learning* (Tao et al., ICASSP 2022)."""


def model_card(
    settings,
    encoder,
    step="",
    n_classes=0,
    decision=None,
    data=None,
    rows=None,
    licence="other",
):
    """Writes a card.

    Arguments
    ---------
    settings : dict
        From "stage 1" and "stage 2", as far as the model has passed them, to
        their settings as `run_folder.plain_settings` reads them.
    encoder : str
        The name of its class.
    step : str
        The step of the run that left it, such as "iter2/gated"; empty for a
        checkpoint of no run.
    n_classes : int
        Pseudo-speakers of its classifier, 0 without one.
    decision : (float, str), optional
        The threshold, and how it was found, one of `FOUND`.
    data : dict, optional
        What the model was trained on: its "name", the number of "utterances"
        and of those "held_out", and "hours".
    rows : dict, optional
        The run's figures from `metrics.summarise`.
    licence : str
        Of the weights, as Hugging Face names it.

    Returns
    -------
    str
        Markdown after a YAML front matter.

    Example
    -------
    >>> settings = {"stage 1": {"sample_rate": 16000, "data_folder": "/my/vox"}}
    >>> card = model_card(settings, "ECAPA_TDNN", "stage1")
    >>> print(card[:44])
    ---
    license: other
    library_name: speechbrain
    >>> "| data_folder | vox |" in card
    True
    """
    stage, chosen = max(settings.items())
    rows, own = _rows_until(rows or {}, step)
    trials = last_name(chosen.get("verification_file") or "")
    decided, found = UNDECIDED, 0.25
    if decision is not None:
        found, way = "model.hparams.threshold", FOUND[decision[1]]
        decided = DECISION.format(threshold=decision[0], found=way)
    method = STAGE2 if stage == "stage 2" else STAGE1
    if n_classes:
        iteration = step.split("/")[0].removeprefix("iter")
        method += CLASSES.format(iteration=iteration, n_classes=n_classes)
    return CARD.format(
        front=_front_matter(rows.get(own, {}), trials, licence),
        title=TITLE,
        encoder=encoder,
        rate=chosen["sample_rate"],
        use=USE.format(threshold=found),
        decision=_fill(decided),
        data=_fill(_data(data)),
        method=_fill(method + PAPER),
        results=_results(rows, own, trials),
        settings="\n\n".join(map(_settings, settings.items())),
        licence=_code(licence),
    )


def last_name(text):
    """The last part of a path; other texts as they are.

    Example
    -------
    >>> (
    ...     last_name("/home/ann/vox"),
    ...     last_name("D:\\\\vox\\\\"),
    ...     last_name("bf16"),
    ... )
    ('vox', 'vox', 'bf16')
    """
    return pathlib.PureWindowsPath(text).name  # knows both separators


def _front_matter(figures, trials, licence):
    """What Hugging Face reads of a card."""
    front = {
        "license": licence,
        "library_name": "speechbrain",
        "tags": [
            "speechbrain",
            "speaker-verification",
            "speaker-embeddings",
            "self-supervised",
            "loss-gated-learning",
        ],
    }
    if "eer" in figures:
        rate = round(figures["eer"], 4)
        metrics = [{"type": "eer", "name": "EER %", "value": rate}]
        front["metrics"] = ["eer"]
        front["model-index"] = [
            {
                "name": TITLE,
                "results": [
                    {
                        "task": {"type": "speaker-verification"},
                        "dataset": {"name": trials, "type": "trial-list"},
                        "metrics": metrics,
                    }
                ],
            }
        ]
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True)


def _rows_until(rows, step):
    """The rows of a run up to the one of a step, and that one's name."""
    place, *phase = step.split("/")
    own = "Stage I"
    if place.startswith("iter"):
        own = f"iteration {place.removeprefix('iter')}, {'/'.join(phase)}"
    if own in rows:
        names = list(rows)
        rows = {name: rows[name] for name in names[: names.index(own) + 1]}
    return rows, own


def _data(data):
    if data is None:
        return "What the model was trained on is not on record."
    return (
        f"{data['utterances']:,} utterances, {data['hours']:,.1f} hours, of "
        f"{_code(data['name'])}, without their speakers' names. On "
        f"{data['held_out']:,} of them no gradient was taken."
    )


def _results(rows, own, trials):
    header, body = cells([rows], FIGURES)
    if len(header) == 1:
        return "None are on record."
    body = [
        [f"**{name}**" if name == own else name, *rest] for name, *rest in body
    ]
    said = "The model of this folder is the row in bold."
    if own not in rows:
        said = "The model of this folder was not scored by itself."
    if trials:
        said += (
            f" Equal error rate (EER) and minDCF, for targets as frequent as "
            f"1 and 5 %, are those of the trials in {_code(trials)}, which "
            "decided nothing."
        )
    if {"NMI", "AMI"} & {*header}:
        said += (
            " NMI and AMI say how the pseudo-labels agree with the speakers, "
            "by whose names nothing was trained."
        )
    return f"{_table(header, body)}\n\n{_fill(said)}"


def _settings(stage):
    name, settings = stage
    rows = [[key, value] for key, value in flatten(_without_paths(settings))]
    table = _table(["setting", "value"], rows)
    name = name.replace("stage 1", "Stage I").replace("stage 2", "Stage II")
    return f"<details><summary>{name}</summary>\n\n{table}\n\n</details>"


def _without_paths(value):
    if isinstance(value, dict):
        return {key: _without_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_paths(part) for part in value]
    return last_name(value) if isinstance(value, str) else value


def _fill(text):
    """Text in lines of 80 columns."""
    return textwrap.fill(" ".join(text.split()), 80, break_long_words=False)


def _code(text):
    """Text as Markdown's code, which it cannot end."""
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"


def _plain(text):
    """Text that stays text: no HTML, no link, no other cell or line."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"[\\|`]|(?<=\])\(", r"\\\g<0>", text)


def _table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_plain, line))} |" for line in lines)
