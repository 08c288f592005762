"""Writes the page of `lgl who`: each speaker's files, to listen to."""

import os
import pathlib
import urllib.parse

import numpy as np

from lgl_plugin.inference.speakers import Speakers, by_speaker, sounds_like
from lgl_plugin.report.page import render

# Limits on players, with which a browser gets slow; speakers.csv has all files.
PLAYERS_A_SPEAKER = 12
PLAYERS = 3000
PLAYERS_WRONG = 100


def write_page(
    path: str | pathlib.Path, speech: Speakers, audio: str | pathlib.Path
) -> pathlib.Path:
    """Writes a page that lists the speakers and plays their files.

    The page refers to the audio by relative paths. For a large corpus it plays
    each speaker's clearest and least clear files.
    """
    path = pathlib.Path(path)
    folder = os.path.relpath(os.path.abspath(audio), path.absolute().parent)
    rows = by_speaker(speech)
    starts = np.flatnonzero(np.diff(speech.labels[rows], prepend=-1))
    shown = 0
    groups = []
    for members in np.split(rows, starts[1:]):
        if shown >= PLAYERS:
            break
        chosen = members
        if len(members) > PLAYERS_A_SPEAKER:
            half = PLAYERS_A_SPEAKER // 2
            chosen = np.append(members[:half], members[-half:])
        shown += len(chosen)
        groups.append(
            {
                "name": speech.name(speech.labels[members[0]]),
                "files": len(members),
                "minutes": speech.seconds[members].sum() / 60,
                "hidden": len(members) - len(chosen),
                "players": [_player(speech, row, folder) for row in chosen],
            }
        )
    wrong = speech.named.wrong[:PLAYERS_WRONG] if speech.named else []
    return render(
        "speakers.html",
        path,
        groups=groups,
        wrong=[
            {
                **_player(speech, row, folder),
                "label": speech.name(speech.labels[row]),
                "heard": sounds_like(speech, row),
            }
            for row in wrong
        ],
        named=bool(speech.names),
        n_speakers=speech.n_speakers,
        n_files=len(speech.files),
        hours=float(speech.seconds.sum()) / 3600,
        rule=speech.rule,
        left_out=speech.n_speakers - len(groups),
    )


def _player(speech, row, folder):
    """Returns the template's values for a file that the page plays."""
    name = speech.files[row]
    joined = os.path.join(folder, name).replace(os.sep, "/")
    return {
        "name": name,
        # With "./": a name such as "a:b.wav" would be a URL of scheme "a".
        "address": "./" + urllib.parse.quote(joined),
        "confidence": float(speech.confidence[row]),
    }
