"""Steps of tiny Brains on a device, for gpu_check.py: do they come out right?

The Brains and encoders are those of the tests: every method, and every kind
of encoder behind its real features. Each function returns rows of a table; a
row that `fails` says why.
"""

import contextlib
import os
import pathlib
import sys
import tempfile
from unittest import mock

import torch

sys.path.append(str(pathlib.Path(__file__).parents[1] / "tests"))

import speechbrain as sb  # noqa: E402
import tiny_brains  # noqa: E402
from pretended_device import DEVICE, Waits, present  # noqa: E402
from tiny_brains import begin, make_brain, watch_step  # noqa: E402
from tiny_encoders import ENCODERS  # noqa: E402

from lgl_plugin.nnet.augment import NoAugmentation  # noqa: E402

SAMPLES = 8000  # of a crop
# Distance of a result from float64's, relative to its length, that is no fault.
# Some networks lose more to float32's rounding, on a CPU too: the device may
# then be FACTOR times as far as the CPU.
LIMITS = {"loss": 1e-4, "embeddings": 1e-4, "gradient": 1e-3}
FACTOR = 5
PAIRS = [(kind, "ecapa") for kind in tiny_brains.BRAINS]
PAIRS += [("simclr", name) for name in ENCODERS if name != "ecapa"]


@contextlib.contextmanager
def brain_of(kind, encoder, device, modules=(), prepare=lambda x: x, **opts):
    """Makes a Brain, the same at each call, and takes its folder away."""
    torch.manual_seed(0)
    longer = mock.patch.object(tiny_brains, "TIME", SAMPLES)
    with tempfile.TemporaryDirectory() as folder, longer:
        brain = make_brain(
            kind,
            pathlib.Path(folder),
            modules,
            {"device": str(device), **opts},
            encoder=prepare(ENCODERS[encoder]()),
        )
        yield begin(brain)


@contextlib.contextmanager
def tf32(allowed):
    """Lets products and convolutions of float32 use TF32, or not."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def in_float64(encoder):
    """Lets an encoder, and a teacher's copy of it, compute in float64."""
    encoder.register_forward_pre_hook(
        lambda module, given: tuple(x.double() for x in given)
    )
    return encoder.double()


def one_step(kind, encoder, device, prepare=lambda x: x):
    """Returns loss, embeddings and gradient of a batch, float64, on the CPU."""
    # Augmentation would draw otherwise on another device.
    modules = {"augment": NoAugmentation()}
    with brain_of(kind, encoder, device, modules, prepare) as brain:
        if kind not in tiny_brains.STAGE2:
            brain.train_adversary = lambda embeddings: None  # Adam's first step
            _fill(getattr(brain.method, "queue", None))
        torch.manual_seed(1)
        given = tiny_brains.batch(tiny_brains.n_crops(brain))
        outputs = brain.compute_forward(given, sb.Stage.TRAIN)
        loss = brain.compute_objectives(outputs, given, sb.Stage.TRAIN)
        loss.backward()
        gradient = [
            p.grad.flatten().double().cpu()
            for p in brain.modules.parameters()
            if p.grad is not None
        ]
        embeddings = outputs
        if kind not in tiny_brains.STAGE2:
            embeddings = outputs[0][0]
        return {
            "loss": loss.detach().double().cpu(),
            "embeddings": embeddings.detach().double().cpu(),
            "gradient": torch.cat(gradient),
        }


def _fill(queue):
    """Puts other utterances into a method's queue, which begins empty."""
    if queue is not None:
        vectors = torch.randn(queue.vectors.shape)
        queue.add(
            torch.arange(len(vectors)).to(queue.groups.device) + 100,
            vectors.to(queue.vectors.device),
        )


def parity(device):
    """Says how far a step in float32 is from one in float64 on the CPU.

    On a GPU by products in float32 and, without a limit, in TF32.
    """
    rows, on_gpu = [], torch.device(device).type == "cuda"
    for kind, encoder in PAIRS:
        exact = one_step(kind, encoder, "cpu", in_float64)
        row = {"method": kind, "encoder": encoder}
        cpu = _distances(one_step(kind, encoder, "cpu"), exact)
        row.update((f"{name}, CPU", far) for name, far in cpu.items())
        fails = [name for name, far in cpu.items() if not far <= 0.05]
        if on_gpu:
            for way in ("float32", "TF32"):
                with tf32(way == "TF32"):
                    gpu = _distances(one_step(kind, encoder, device), exact)
                row.update((f"{name}, {way}", far) for name, far in gpu.items())
                fails += [
                    f"{name} on the GPU"
                    for name, far in gpu.items()
                    if way == "float32"
                    and not far <= max(LIMITS[name], FACTOR * cpu[name])
                ]
        rows.append({**row, "fails": ", ".join(fails)})
    return rows


def _distances(found, exact):
    return {
        name: float((found[name] - value).norm() / value.norm())
        for name, value in exact.items()
    }


def waits(device):
    """Does steps in which the host may wait for nothing.

    Without a GPU on a device that is pretended.
    """
    rows = []
    device = device if torch.device(device).type == "cuda" else DEVICE
    for kind, encoder in PAIRS:
        row = {"method": kind, "encoder": encoder, "fails": ""}
        with present(device), brain_of(kind, encoder, device) as brain:
            try:
                copies = watch_step(brain)
                if device == DEVICE:  # a GPU does not tell
                    row["copies"] = len(copies)
            except (Waits, RuntimeError) as error:
                row["fails"] = str(error).splitlines()[0]
        rows.append(row)
    return rows


def precisions(device):
    """Trains a few steps in each precision, beside float32."""
    rows, on_gpu = [], torch.device(device).type == "cuda"
    for kind in ("simclr", "dino", "sdpn", "gated"):
        first = {}
        for precision in ("fp32", "bf16", *["fp16"] * on_gpu):
            with brain_of(kind, "ecapa", device, precision=precision) as brain:
                losses = _losses(brain, 6)
                weights = brain.modules.encoder.parameters()
                finite = all(bool(p.isfinite().all()) for p in weights)
                skipped = int(brain.tally.counts.get("skipped", 0))
            first[precision] = losses[0]
            apart = abs(losses[0] / first["fp32"] - 1)
            fails = [] if finite else ["weights are not finite"]
            if not apart <= 0.1:
                fails.append("the first loss is not that of float32")
            # float16's scale begins too high and falls.
            if skipped > 3 * (precision == "fp16"):
                fails.append("steps were skipped")
            rows.append(
                {
                    "method": kind,
                    "precision": precision,
                    "first loss": losses[0],
                    "last": losses[-1],
                    "from float32's first": apart,
                    "skipped": skipped,
                    "fails": ", ".join(fails),
                }
            )
    return rows


def _losses(brain, steps):
    """Trains on one batch; returns the loss of each step."""
    given, losses = tiny_brains.batch(tiny_brains.n_crops(brain)), []
    for brain.step in range(1, steps + 1):
        loss = brain.fit_batch(given)
        brain.update_average(loss, 0.0)
        losses.append(float(loss))
    return losses


def compiled(device):
    """Compares networks with themselves, compiled; on a GPU alone."""
    rows = []
    for name in ("ecapa", "resnet") if device != "cpu" else ():
        torch.manual_seed(0)
        encoder = ENCODERS[name]().to(device)
        wavs = torch.randn(6, SAMPLES).to(device)
        found = {}
        for way in ("eager", "compiled"):
            if way == "compiled":
                encoder.network.compile()
            encoder.zero_grad()
            loss = encoder(wavs).square().mean()
            loss.backward()
            gradient = [p.grad.flatten() for p in encoder.parameters()]
            found[way] = torch.cat(gradient)
        apart = found["compiled"] - found["eager"]
        apart = float(apart.norm() / found["eager"].norm())
        fails = "" if apart <= 0.01 else "beyond 0.01"
        rows.append({"encoder": name, "gradient": apart, "fails": fails})
    return rows


def one_process(device):
    """Trains in a group of one process as without, by NCCL where it can."""
    backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
    kinds = ("simclr", "moco", "dino", "sdpn", "gated")
    alone = {}
    for kind in kinds:
        with brain_of(kind, "ecapa", device) as brain:
            alone[kind] = _losses(brain, 3)
    rows = []
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            backend, init_method=f"file://{folder}/group", rank=0, world_size=1
        )
        try:
            for kind in kinds:
                options = {"distributed_launch": True}
                options["distributed_backend"] = backend
                with brain_of(kind, "ecapa", device, **options) as brain:
                    losses = _losses(brain, 3)
                    wrapped = type(brain.modules.encoder).__name__
                apart = max(abs(a - b) for a, b in zip(losses, alone[kind]))
                fails = "" if apart <= 0.01 else "other losses than alone"
                if wrapped != "DistributedDataParallel":
                    fails = f"the encoder is a {wrapped}"
                rows.append(
                    {
                        "method": kind,
                        "backend": backend,
                        "loss from that alone": apart,
                        "fails": fails,
                    }
                )
        finally:
            torch.distributed.destroy_process_group()
    return rows
