"""Differences between settings, and which of them change a run's result."""

import json
from collections.abc import Collection, Iterator
from typing import Any

# Settings that do not change the result: paths (checksums of the content are on
# record), and options of reading, logging and checkpoints.
SAME_RESULT = {
    "output_folder",
    "data_folder",
    "train_folder",
    "trial_folder",
    "manifest",
    "verification_file",
    "pretrained_encoder",
    "stage1_yaml",
    "allow_outside_data_folder",
    "max_bad_share",
    "train_logger",
    "num_workers",
    "pin_memory",
    "prefetch_factor",
    "persistent_workers",
    "timeout",
    "multiprocessing_context",
    "ckpt_interval_minutes",
    "keep_checkpoints",
}
# Settings of which only the presence counts: their content is on record.
PRESENCE = {"musan_folder", "rir_folder", "labels_file"}


def identity(settings: Any) -> Any:
    """Keeps only the plain settings that change the result of a run.

    Data, trial lists and encoders count by their content, which the run folder
    has on record, not by where they lie.
    """
    if isinstance(settings, list):
        return [identity(value) for value in settings]
    if not isinstance(settings, dict):
        return settings
    return {
        key: bool(value) if key in PRESENCE else identity(value)
        for key, value in settings.items()
        if key not in SAME_RESULT
    }


def changes(before: dict, now: dict, alike: Collection[str] = ()) -> list[str]:
    """Describes how plain settings differ, one line for each setting.

    The lines name what a user has typed: a value that follows from another
    setting by reference is left out. Settings named in `alike` may differ, and
    are left out, too.
    """
    old = dict(flatten(identity(before)))
    new = dict(flatten(identity(now)))
    pairs = {
        name: (old.get(name, "not set"), new.get(name, "not set"))
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    }
    typed = {pair for name, pair in pairs.items() if "." not in name}
    return [
        f"{name}: was {was}, is {now}"
        for name, (was, now) in pairs.items()
        if name not in alike and ("." not in name or (was, now) not in typed)
    ]


def flatten(settings: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields nested plain settings as pairs of dotted name and text.

    A tag is the value of its entry, and its arguments are entries below it.
    SpeechBrain's own keys, which begin with two underscores, are left out.
    """
    for key, value in settings.items():
        if str(key).startswith("__"):
            continue
        name = f"{prefix}{key}"
        if isinstance(value, dict) and len(value) == 1:
            tag = str(next(iter(value)))
            if tag.startswith("!"):
                yield name, tag.split(":", 1)[-1]
                (value,) = value.values()
                if value == "":
                    continue
        if isinstance(value, dict):
            yield from flatten(value, f"{name}.")
        else:
            plain = isinstance(value, str)
            yield name, value if plain else json.dumps(value, default=str)
