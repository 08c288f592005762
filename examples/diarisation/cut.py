#!/usr/bin/env python3
"""Cuts long recordings by a diarisation, without copying any audio.

Any diarisation that writes RTTM will do (NIST 2009; pyannote.audio, NeMo,
SpeechBrain's recipes). Its turns become rows of a manifest, each a part of
its recording, which Stage I and II then train on as utterances.

> python cut.py /my/recordings turns.rttm segments.csv
> lgl train /my/recordings --output_folder=results/mine \
    --manifest=segments.csv
"""

import collections
import csv
import pathlib
import sys

import soundfile

from lgl_plugin.dataio.folder import EXTENSIONS

SHORTEST, LONGEST = 1.0, 20.0  # seconds; longer turns are cut into equal parts


def read_rttm(path):
    """Reads turns: from recording to a list of (start, seconds, speaker)."""
    turns = collections.defaultdict(list)
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            fields = line.split()
            if fields and fields[0] == "SPEAKER":
                _, recording, _, start, seconds, _, _, speaker, *_ = fields
                turns[recording].append((float(start), float(seconds), speaker))
    return turns


def alone(turns):
    """Yields the parts of turns in which nobody else speaks."""
    ends = {start for start, _, _ in turns}
    ends = sorted(ends | {start + seconds for start, seconds, _ in turns})
    joined = []
    for start, end in zip(ends, ends[1:]):
        speaking = {
            speaker
            for first, seconds, speaker in turns
            if first <= start and end <= first + seconds
        }
        if len(speaking) != 1:
            continue
        (speaker,) = speaking
        if joined and joined[-1][1:] == [start, speaker]:
            joined[-1][1] = end
        else:
            joined.append([start, end, speaker])
    yield from joined


def parts(start, end):
    """Yields pieces of a turn, none longer than `LONGEST`."""
    number = int(-(-(end - start) // LONGEST))
    for n in range(number):
        length = (end - start) / number
        yield start + n * length, start + (n + 1) * length


def cut(audio, rttm, output):
    """Writes the manifest of all turns of one speaker alone."""
    turns, n_rows, seconds = read_rttm(rttm), 0, 0.0
    with open(output, "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(["ID", "duration", "wav", "start", "stop", "spk_id"])
        for path in sorted(pathlib.Path(audio).rglob("*")):
            if path.stem not in turns or path.suffix.lower() not in EXTENSIONS:
                continue
            rate = soundfile.info(path).samplerate
            name = path.relative_to(audio).as_posix()
            for start, end, _ in alone(turns[path.stem]):
                for first, last in parts(start, end):
                    if last - first < SHORTEST:
                        continue
                    # spk_id stays empty: a diarisation's speakers are those
                    # of one recording, and not the truth.
                    samples = round(first * rate), round(last * rate)
                    duration = (samples[1] - samples[0]) / rate
                    row = [f"{name}#{samples[0]}", f"{duration:.6f}"]
                    row += [f"$data_root/{name}", *samples, ""]
                    writer.writerow(row)
                    n_rows, seconds = n_rows + 1, seconds + duration
    print(f"{output}: {n_rows} utterances, {seconds / 3600:.2f} hours")


if __name__ == "__main__":
    cut(*sys.argv[1:])
