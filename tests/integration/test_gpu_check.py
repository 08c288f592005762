"""The check of a GPU, without one: what it reports, and that it can fail."""

import json
import pathlib

import pytest
import torch

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The scripts import each other, as from their own folder."""
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture
def on_a_device(monkeypatch):
    import on_a_device

    monkeypatch.setattr(on_a_device, "PAIRS", [("gated", "ecapa")])
    return on_a_device


def test_a_result_that_is_off_is_found(on_a_device, monkeypatch):
    (row,) = on_a_device.parity("cpu")
    assert row["fails"] == "" and 0 < row["gradient, CPU"] < 1e-3

    def shifted(encoder):
        encoder.register_forward_hook(lambda *given: given[-1] + 0.1)
        return encoder

    monkeypatch.setattr(on_a_device, "in_float64", shifted)
    (row,) = on_a_device.parity("cpu")
    assert "gradient" in row["fails"]


def test_every_method_and_encoder_is_near_float64():
    from on_a_device import PAIRS, parity

    rows = parity("cpu")
    assert [(row["method"], row["encoder"]) for row in rows] == PAIRS
    assert not any(row["fails"] for row in rows)


def test_a_wait_is_found(on_a_device, monkeypatch):
    (row,) = on_a_device.waits("cpu")
    assert row["fails"] == ""
    monkeypatch.setattr(torch.Tensor, "to", _waiting(torch.Tensor.to))
    (row,) = on_a_device.waits("cpu")
    assert "waits" in row["fails"]


def _waiting(to):
    def wait(tensor, *where, **options):
        options.pop("non_blocking", None)
        return to(tensor, *where, **options)

    return wait


def test_a_failed_check_is_told_and_the_others_stand(tmp_path, monkeypatch):
    import gpu_check

    def breaks(device):
        raise RuntimeError(f"no {device} here")

    checks = {"breaks": (breaks, "it breaks", 1)}
    monkeypatch.setattr(gpu_check, "CHECKS", checks)
    gpu_check.run("breaks", "cpu", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == {"rows": [], "error": "RuntimeError: no cpu here"}
    rows = [{"what": "a", "share": 0.25}]
    common = {"tells": "it works", "seconds": 1.0}
    page = gpu_check.page(
        [
            {"check": "one", "verdict": "passed", "rows": rows, **common},
            {"check": "two", "verdict": "failed", "rows": [], **common},
        ],
        {"device": "cuda"},
    )
    assert page.startswith("# GPU check: failed: two")
    assert "| a | 0.25 |" in page and "## one: it works" in page


@pytest.mark.parametrize("status", [0, 1])
def test_a_crash_of_a_check_is_its_own(status, tmp_path, monkeypatch):
    """Such as one that takes the process with it."""
    import gpu_check

    script = tmp_path / "script.py"
    script.write_text(f"raise SystemExit({status})", encoding="utf-8")
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    with open(tmp_path / "log", "w", encoding="utf-8") as log:
        found = gpu_check.outcome("waits", "cpu", log)
    assert found["verdict"] == "failed"
    assert found["why"] == f"ended with status {status}"
