"""`lgl export`: writes a folder that SpeechBrain loads from a checkpoint.

> lgl export results/lgl/1  # its latest step, to results/lgl/1/export/…
> lgl export results/lgl/1 stage1 --average=10  # the mean of ten epochs
> lgl export model.ckpt --yaml=stage2.yaml --output=exported
> lgl export campplus.pt --output=exported  # CAM++'s weights
"""

import argparse
import pathlib

from lgl_plugin.cli.common import cosine, show_notices


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    add = parser.add_argument
    add("source", help="output_folder of a run; or a file of weights")
    add(
        "step",
        nargs="?",
        help="ssps (Stage I's last; stage1 without ssps_epochs), iter1, iter2, "
        "iter1/classifier; none: the latest",
    )
    add(
        "--output",
        help="folder to write; RUN/export/STEP, or STEP-custom with a "
        "threshold, license or back-end",
    )
    add("--yaml", help="of weights that are of no run")
    add("--data_folder", help="where the audio is now")
    add("--manifest", help="where the run's own list of utterances is now")
    add("--threshold", type=cosine, help="of the cosine; found without labels")
    add("--license", default="other", help="of the weights, such as cc-by-4.0")
    add(
        "--backend",
        choices=("fitted", "none"),
        help="part of the model or not; as the run's yaml says",
    )
    add(
        "--onnx",
        action="store_true",
        help="add encoder.onnx, waveform to embedding, to the folder",
    )
    add(
        "--average",
        metavar="N",
        type=int,
        help="the mean of the weights of N epochs, see keep_checkpoints",
    )
    add("--device", help="where to embed; none: the CPU")


def run(
    source: str,
    step: str | None,
    output: str | None,
    yaml: str | None,
    data_folder: str | None,
    manifest: str | None,
    threshold: float | None,
    license: str,
    backend: str | None,
    onnx: bool,
    average: int | None,
    device: str | None,
) -> None:
    """Exports a run's step, or a checkpoint with the yaml that trained it."""
    alone = yaml is not None or pathlib.Path(source).is_file()
    if not alone and (pathlib.Path(source) / "hyperparams.yaml").exists():
        others = step, output, threshold, backend, average, device
        others += data_folder, manifest
        if not onnx or license != "other" or {*others} != {None}:
            raise ValueError(
                f"{source} is an encoder's folder already: export takes a "
                "run's output_folder or a file of weights. To such a folder "
                "--onnx, without another option, adds encoder.onnx"
            )
        from lgl_plugin.inference.onnx_export import ONNX, export_onnx

        path = pathlib.Path(source) / ONNX
        export_onnx(source, path)
        print(f"Written: {path}")
        return
    if alone and output is None:
        raise ValueError(
            "a file of weights needs --output, the folder to write to"
        )
    of_a_run = (
        step,
        backend == "fitted" and "--backend=fitted",
        data_folder and f"--data_folder={data_folder}",
        manifest and f"--manifest={manifest}",
        device and f"--device={device}",
    )
    for given in filter(None, of_a_run if alone else ()):
        raise ValueError(
            f"{given} is an option for a run: leave it out for a file of "
            "weights"
        )
    if average is not None and (alone or step is None or average < 2):
        raise ValueError(
            "--average takes 2 epochs or more of a step of a run: name both, "
            "such as results/lgl/1 stage1"
        )
    if average is not None and backend != "none":
        check_backend(source, step, backend)
    from lgl_plugin.inference.checkpoint_average import average_step
    from lgl_plugin.inference.export import export, export_checkpoint
    from lgl_plugin.inference.onnx_export import ONNX, check_onnx, export_onnx
    from lgl_plugin.runs.pretrained import encoder_settings
    from lgl_plugin.runs.settings import read_plain
    from lgl_plugin.runs.state import refuse_adaptation
    from lgl_plugin.runs.weights import read_weights
    from lgl_plugin.utils.device import check_device

    device = check_device(device or "cpu")
    if not alone:
        refuse_adaptation(source)  # before a message to install onnx
    if onnx:
        check_onnx()  # before the search for a threshold
    show_notices()
    if not alone:
        wanted = None if backend is None else backend == "fitted"
        if average is not None:
            step = average_step(source, step, average)
        options = (data_folder, threshold, license, wanted)
        export(source, step, output, device, *options, onnx, manifest)
        return
    settings = read_plain(yaml) if yaml else encoder_settings(source)
    if settings is None:
        read_weights(source)  # raises for a damaged file, which may be CAM++'s
        raise ValueError(
            f"{source} does not say which encoder its weights are of: name the "
            "--yaml that they were trained with"
        )
    folder = pathlib.Path(output or "")
    export_checkpoint(source, settings, folder, threshold, license)
    if onnx:
        export_onnx(folder, folder / ONNX)


def check_backend(run: str, step: str, backend: str | None) -> None:
    """Refuses to export an average with a back-end: none was fitted to it."""
    from lgl_plugin.runs.run import stage_of
    from lgl_plugin.runs.state import read_state

    settings = read_state(run)["settings"].get(stage_of(step), {})
    if backend == "fitted" or settings.get("backend"):
        raise ValueError(
            "an average of epochs has no back-end, since back-ends are fitted "
            "to the embeddings of a phase: --backend=none exports the encoder "
            "alone"
        )
