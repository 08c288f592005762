"""The page of `lgl who`: each speaker with the files to listen to."""

from __future__ import annotations

import os
import pathlib
import urllib.parse

import jinja2
import numpy as np

from lgl_plugin.inference.speakers import Speakers, by_speaker, sounds_like
from lgl_plugin.utils.files import atomic_write

# A browser is slow with more players than these; speakers.csv has all files.
PLAYERS_A_SPEAKER = 12
PLAYERS = 3000
PLAYERS_WRONG = 100


def write_page(
    path: str | pathlib.Path, speech: Speakers, audio: str | pathlib.Path
) -> pathlib.Path:
    """Writes a page that lists the speakers and plays their files.

    The audio stays where it is: the page names it by relative paths. Of a
    large corpus it plays the clearest and the least clear of each speaker.
    """
    path = pathlib.Path(path)
    here = os.path.relpath(os.path.abspath(audio), path.absolute().parent)
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
                "players": [_player(speech, row, here) for row in chosen],
            }
        )
    wrong = speech.named.wrong[:PLAYERS_WRONG] if speech.named else []
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("speakers.html").render(
        groups=groups,
        wrong=[
            {
                **_player(speech, row, here),
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
    with atomic_write(path) as out:
        out.write(text)
    return path


def _player(speech, row, folder):
    """Returns what the page says of a file that it plays."""
    return {
        "name": speech.files[row],
        "address": _address(folder, speech.files[row]),
        "confidence": float(speech.confidence[row]),
    }


def _address(folder, name):
    """Returns a file's relative address, with what URLs reserve escaped."""
    joined = os.path.join(folder, name).replace(os.sep, "/")
    # "./" or a name such as "a:b.wav" would be read as a URL of scheme "a".
    return "./" + urllib.parse.quote(joined)
