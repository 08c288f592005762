#!/usr/bin/env python3
"""Who speaks in which file of a folder; `lgl who` in a few lines of Python.

Puts a link to each file into a folder of its speaker, which any recipe with
one folder per speaker can then train on.

> python who.py results/lgl/1/export/iter5 /my/audio by_speaker
"""

import pathlib
import sys

from lgl_plugin.inference.folder import embed_folder
from lgl_plugin.inference.speakers import find_speakers

LEAST_CONFIDENCE = 0.1  # from -1 to 1; others lie between two speakers


def link_by_speaker(encoder, audio, output):
    """Sorts a folder's files into one folder of links per speaker."""
    audio, output = pathlib.Path(audio).resolve(), pathlib.Path(output)
    manifest, embeddings = embed_folder(encoder, audio, output / ".embeddings")
    found = find_speakers(encoder, manifest, embeddings)
    sure = found.confidence >= LEAST_CONFIDENCE
    for link in output.glob("speaker*/*"):  # of an earlier call
        if link.is_symlink():
            link.unlink()
    for name, speaker, is_sure in zip(found.files, found.labels, sure):
        if is_sure:
            link = output / f"speaker{speaker + 1}" / name.replace("/", "__")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(audio / name)
    print(
        f"{found.n_speakers} speakers by {found.rule}; {sure.sum()} of "
        f"{len(sure)} files are in {output}"
    )


if __name__ == "__main__":
    link_by_speaker(*sys.argv[1:])
