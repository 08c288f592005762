"""The command beside SpeechBrain's own functions: start, prepare, embed.

> python benchmarks/command.py --threads=2 --repeats=5
> python benchmarks/command.py --threads=2 --repeats=5 --neighbour
> PYTHONPATH=/path/to/resemblyzer python benchmarks/command.py --threads=1

Each variant is a process of its own, start included, on the same generated
wav files of 2 to 12 s: what a user waits for. SpeechBrain's preparation of
VoxCeleb reads every file whole; its inference embeds file by file. The encoder
is ECAPA-TDNN of random weights. Resemblyzer, where it is installed, embeds by
its own network, an LSTM. `--neighbour` keeps one core busy meanwhile.
"""

import contextlib
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile

import torch
from common import arguments, measure, report
from extraction import write_speech

from lgl_plugin.inference.export import export_checkpoint
from lgl_plugin.runs.plain import plain_settings
from lgl_plugin.runs.settings import load_settings

HPARAMS = pathlib.Path(__file__).parents[1] / "hparams"
PREPARE = """
import sys
from lgl_plugin.dataio.prepare import prepare_manifest
prepare_manifest(sys.argv[1], sys.argv[2], speaker_folder=False)
"""
THEIR_PREPARE = """
import pathlib, sys
from speechbrain.dataio.dataio import read_audio
with open(sys.argv[2], "w") as out:
    for path in sorted(pathlib.Path(sys.argv[1]).glob("*.wav")):
        print(path, len(read_audio(str(path))) / 16000, file=out)
"""
THEIR_EMBED = """
import pathlib, sys
import numpy as np
from speechbrain.inference.speaker import EncoderClassifier
encoder = EncoderClassifier.from_hparams(
    sys.argv[2], run_opts={"device": sys.argv[4]}
)
vectors = [
    encoder.encode_batch(encoder.load_audio(str(path))[None])[0, 0].cpu()
    for path in sorted(pathlib.Path(sys.argv[1]).glob("*.wav"))
]
np.save(sys.argv[3], np.stack(vectors))
"""
RESEMBLYZER = """
import pathlib, sys
import numpy as np
from resemblyzer import VoiceEncoder, preprocess_wav
encoder = VoiceEncoder(sys.argv[3])
vectors = [
    encoder.embed_utterance(preprocess_wav(path))
    for path in sorted(pathlib.Path(sys.argv[1]).glob("*.wav"))
]
np.save(sys.argv[2], np.stack(vectors))
"""
IMPORT = "from speechbrain.inference.speaker import EncoderClassifier"
BUSY = "while True: pass"
LEAST = 150  # of which the preset's batch can be held out and trained on
# Each command, and the one that it is compared with.
PAIRS = {
    "lgl --help": "importing SpeechBrain's inference",
    "prepare": "prepare, SpeechBrain's way",
    "lgl embed": "embed, SpeechBrain's way",
}


def make_encoder(folder):
    """Writes the preset's encoder, untrained, as SpeechBrain loads it."""
    settings, text = load_settings(
        HPARAMS / "stage1.yaml", f"data_folder: {folder}"
    )
    torch.manual_seed(0)
    state = settings.new_encoder().network.state_dict()
    torch.save(state, folder / "weights.ckpt")
    export_checkpoint(
        folder / "weights.ckpt", plain_settings(text), folder / "encoder"
    )


def main(options, folder):
    """Times the variants in turn."""
    audio = folder / "audio"
    audio.mkdir()
    write_speech(audio, options.n)
    make_encoder(folder)
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    counter = iter(range(10**6))

    def process(*words):
        """A callable that runs Python; "new" is a fresh path."""

        def call():
            new = str(folder / f"made{next(counter)}")
            subprocess.run(
                [sys.executable, *(new if w == "new" else w for w in words)],
                env=environment,
                check=True,
                capture_output=True,
            )

        return call

    lgl = ("-m", "lgl_plugin")
    encoder, device = str(folder / "encoder"), options.device
    variants = {
        "lgl --help": process(*lgl, "--help"),
        "importing SpeechBrain's inference": process("-c", IMPORT),
        "prepare": process("-c", PREPARE, str(audio), "new"),
        "prepare, SpeechBrain's way": process(
            "-c", THEIR_PREPARE, str(audio), "new"
        ),
        # By itself it would take the GPU, and SpeechBrain's way the CPU.
        "lgl embed": process(
            *lgl, "embed", encoder, str(audio), "new", f"--device={device}"
        ),
        "embed, SpeechBrain's way": process(
            "-c", THEIR_EMBED, str(audio), encoder, "new", device
        ),
    }
    if options.n >= LEAST:
        variants["lgl check"] = process(
            *lgl, "check", str(audio), f"--device={device}"
        )
    else:
        print(f"`lgl check` needs {LEAST} files or more, and is left out")
    if importlib.util.find_spec("resemblyzer"):
        name = "embed, Resemblyzer's way"
        variants[name] = process("-c", RESEMBLYZER, str(audio), "new", device)
    else:
        print("Resemblyzer is not installed, and left out")
    with contextlib.ExitStack() as stack:
        if options.neighbour:
            busy = subprocess.Popen([sys.executable, "-c", BUSY])
            stack.callback(busy.kill)
        found = measure(variants, options.repeats)
    rows = []
    for name, took in found.items():
        seconds = {k: took[k] for k in ("median", "lowest", "highest")}
        row = {"what": name, **seconds}
        if name in PAIRS:
            row["times theirs"] = found[PAIRS[name]]["median"] / took["median"]
        rows.append(row)
    beside = ", beside a busy process" if options.neighbour else ""
    title = f"seconds of a command, {options.n} files, start included{beside}"
    report(rows, title, options.json, device)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument(
        "--n",
        type=int,
        default=200,
        help=f"audio files; `lgl check` is timed from {LEAST} on",
    )
    parser.add_argument(
        "--neighbour", action="store_true", help="a busy process beside them"
    )
    with tempfile.TemporaryDirectory() as temporary:
        main(parser.parse_args(), pathlib.Path(temporary))
