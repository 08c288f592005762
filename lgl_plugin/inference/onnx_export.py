"""Exports an encoder as one ONNX file, from waveform to embedding.

torch's exporter cannot write a Fourier transform to ONNX. A frame's spectrum
is a linear map of its samples, so a convolution with the spectra of single
impulses replaces it.
"""

import contextlib
import functools
import pathlib
import tempfile
import types
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from speechbrain.processing.features import STFT, InputNormalization
from torch.nn.functional import conv1d, pad

from lgl_plugin.inference.extractor import load_extractor
from lgl_plugin.nnet.features import KaldiFbank
from lgl_plugin.utils.files import atomic_write
from lgl_plugin.utils.speechbrain_internals import replace_statistics

ONNX = "encoder.onnx"  # in an exported folder
TOLERANCE = 1e-4  # of the largest value, or of 1


def export_onnx(source: str | pathlib.Path, path: str | pathlib.Path) -> None:
    """Writes an encoder as an ONNX file, which runs without its classes.

    The input is one `waveform`, float32 (1, samples), the output `embedding`,
    float32 (1, dim). The metadata have the `sample_rate` and the smallest
    number of samples, `min_samples`. Before the file is written, the model is
    run on that number of samples and on three seconds.

    Arguments
    ---------
    source : str or pathlib.Path
        A source for `load_extractor`.
    path : str or pathlib.Path
        The file to write.

    Raises
    ------
    FileNotFoundError
        If the source is missing.
    ValueError
        If the encoder cannot be loaded or written, or the file's embeddings
        differ from the encoder's; if onnx or onnxruntime is missing.

    Example
    -------
    >>> export_onnx("results/mine/export/iter2", "mine.onnx")  # doctest: +SKIP
    """
    onnx, onnxruntime = check_onnx()
    extract = load_extractor(source)
    # eval() on the outermost module: the exporter afterwards restores that
    # module's mode in all parts.
    encoder, rate = extract.encoder.eval(), extract.sample_rate
    shortest = getattr(encoder, "min_samples", 1)
    waveforms = [torch.randn(1, n) / 9 for n in (shortest, 3 * rate + 123)]
    with torch.no_grad():
        expected = [encoder(waveform).numpy() for waveform in waveforms]
        if not np.isfinite(expected[0]).all():
            raise ValueError(
                f"{source}: the encoder's own embedding of its shortest "
                f"waveform ({shortest} samples) is not finite. Give the class "
                "of its network masks_padding = True and min_frames, the "
                "fewest frames that it embeds."
            )
        _make_traceable(encoder)
        try:
            with (
                tempfile.TemporaryDirectory() as folder,
                warnings.catch_warnings(),
                _no_graph(),
            ):
                written = pathlib.Path(folder) / ONNX
                # The tracer warns of sizes that it takes as constants. The test
                # of the file below finds the ones that matter.
                warnings.simplefilter("ignore")
                torch.onnx.export(
                    encoder,
                    (torch.randn(1, 2 * rate) / 9,),
                    written,
                    dynamo=False,
                    opset_version=17,
                    input_names=["waveform"],
                    output_names=["embedding"],
                    dynamic_axes={"waveform": {1: "samples"}},
                )
                model = onnx.load(written)
        except Exception as error:  # the exporter may raise any error
            said = str(error).strip() or type(error).__name__
            raise ValueError(
                f"{source}: this encoder cannot be written as ONNX: "
                f"{said.splitlines()[0]}"
            ) from error
    facts = {"sample_rate": rate, "min_samples": shortest}
    facts = {name: str(value) for name, value in facts.items()}
    onnx.helper.set_model_props(model, facts)
    # The tracer gives the embedding's dimensions names instead of sizes.
    sizes = model.graph.output[0].type.tensor_type.shape.dim
    for size, value in zip(sizes, expected[0].shape, strict=True):
        size.dim_value = value
    content = model.SerializeToString()
    try:
        session = onnxruntime.InferenceSession(content)
        outputs = [
            session.run(None, {"waveform": waveform.numpy()})[0]
            for waveform in waveforms
        ]
        apart = max(
            np.abs(one - other).max() / max(1.0, np.abs(other).max())
            for one, other in zip(outputs, expected)
        )
    except Exception as error:  # such as for a length that was traced as fixed
        raise ValueError(
            f"{source}: the ONNX file of this encoder does not run on audio "
            f"of another length: {error}"
        ) from error
    if not apart <= TOLERANCE:
        raise ValueError(
            f"{source}: embeddings of the ONNX file are {apart:.1g} from the "
            "encoder's; nothing was written"
        )
    with atomic_write(path, "wb") as out:
        out.write(content)


def check_onnx() -> tuple[types.ModuleType, types.ModuleType]:
    """Returns onnx and onnxruntime; ValueError if one is not installed."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ValueError(
            f"an ONNX file takes onnx and onnxruntime ({error}): "
            "pip install onnx onnxruntime"
        ) from error
    return onnx, onnxruntime


@contextlib.contextmanager
def _no_graph() -> Iterator[None]:
    """Keeps torch from printing the graph of a network that it cannot write.

    The graph, 27 kB on stdout, would hide the error message. torch's switch for
    it is always on, because torch tests a function instead of its result.
    """
    log = getattr(torch._C, "_jit_onnx_log", None)
    if log is None:  # another release of torch
        yield
        return
    torch._C._jit_onnx_log = lambda *parts: None
    try:
        yield
    finally:
        torch._C._jit_onnx_log = log


def _make_traceable(encoder):
    """Gives an encoder's parts forms that the exporter can write."""
    for part in encoder.modules():
        if isinstance(part, STFT):
            part.forward = functools.partial(_stft, part)
        elif isinstance(part, KaldiFbank):
            part.forward = functools.partial(_kaldi_fbank, part)
        elif isinstance(part, InputNormalization):
            # Its mask of padding would keep the traced length.
            replace_statistics(part, _whole_statistics)
        elif isinstance(part, torch.nn.RMSNorm):
            part.forward = functools.partial(_root_mean_square, part)


def _stft(stft, waveform):
    """Returns SpeechBrain's STFT (1, frames, bins, 2)."""
    around = stft.n_fft - stft.win_length
    window = pad(stft.window, (around // 2, around - around // 2))
    kernel = torch.fft.rfft(torch.eye(stft.n_fft) * window)
    half = stft.n_fft // 2
    return _convolved(pad(waveform, (half, half)), kernel, stft.hop_length)


def _kaldi_fbank(fbank, waveform):
    """Returns Kaldi's features (1, frames, bands)."""
    kernel = fbank.spectrum(torch.eye(fbank.window_size))
    spectrum = _convolved(waveform, kernel, fbank.stride)
    return fbank.logarithm(spectrum.square().sum(3))


def _convolved(waveform, responses, stride):
    """Returns spectra (1, frames, bins, 2) from those of single impulses.

    `responses` are the spectra of the impulses, complex (samples, bins).
    """
    # Two convolutions: one would need a reshape, after which the tracer takes
    # the number of frames as fixed.
    parts = [
        conv1d(waveform[:, None], kernel.T[:, None], stride=stride)
        for kernel in (responses.real, responses.imag)
    ]
    return torch.stack(parts, dim=3).transpose(1, 2)


def _root_mean_square(norm, x):
    """Returns x over its last dimension's root mean square."""
    # This opset has no operator for RMSNorm, with which a back-end begins.
    scaled = x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    return scaled if norm.weight is None else scaled * norm.weight


def _whole_statistics(x, mask, dim):
    """Returns mean and deviation of a whole utterance over its frames."""
    return x.mean(dim), x.var(dim, unbiased=False).sqrt()
