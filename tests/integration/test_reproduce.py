"""reproduce.sh: stages by number, resuming, estimates; the archives.

All of it on a tiny VoxCeleb, killed in each stage, is in
tests/fake_voxceleb.py.
"""

import importlib.util
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
from fake_voxceleb import make_archives
from tiny import RECIPE

spec = importlib.util.spec_from_file_location(
    "reproduce", RECIPE / "reproduce.py"
)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

archives = sys.modules["archives"]

COSTS = {
    "kept": 1000,
    "hours": 10.0,
    "speech_per_hour": 100.0,
    "processes": 2,
    "device": "a GPU",
    "stages": {
        "stage1": {"Stage I": 4.0},
        "stage2": {"Stage II without clustering": 5.0, "embedding": 1.0},
        "moco": {"Stage I": 2.0},
        "dino": {"Stage I": 3.0},
    },
}
# Stands for python: does what is cheap, and notes the rest.
PYTHON = """\
#!/bin/bash
set -eu
work=${{2:-}}
case "$1 $work" in
*reproduce.py\\ hours) exec {python} "$@" ;;
*reproduce.py\\ settings) [[ "$*" != *mocoo* ]] || exec {python} "$@"
    exit ;;
*reproduce.py\\ batch) echo 8; exit ;;
*reproduce.py\\ last) echo iter5/gated; exit ;;
*reproduce.py\\ unpack) mkdir "$DATA/lists"
    for name in veri_test2 list_test_all2 list_test_hard2; do
        echo "1 a/b/c.wav a/b/d.wav" >"$DATA/lists/$name.txt"; done ;;
*reproduce.py\\ check) echo '{costs}' >"$EXP/costs.json" ;;
esac
for word; do
    [[ $word != --output_folder=* ]] || mkdir -p "${{word#*=}}"
done
echo "$@" | sed "s#[^ ]*/##" >>"$LOG"
[[ -z ${{FAIL:-}} || ! "$*" =~ $FAIL ]]
"""


@pytest.fixture
def reproduce(tmp_path):
    """Runs reproduce.sh with a stub; returns status, screen and commands."""
    stub = tmp_path / "bin" / "python"
    stub.parent.mkdir()
    stub.write_text(
        PYTHON.format(python=sys.executable, costs=json.dumps(COSTS))
    )
    stub.chmod(0o755)
    (stub.parent / "ffmpeg").symlink_to("/bin/true")
    folders = {"DATA": tmp_path / "data", "EXP": tmp_path / "exp"}
    log = tmp_path / "log"

    def run(*options, fail=""):
        log.write_text("")
        command = ["bash", RECIPE / "reproduce.sh", "--archives", tmp_path]
        command += ["--data", folders["DATA"], f"--exp={folders['EXP']}"]
        done = subprocess.run(
            [*command, "--methods", "moco dino", *options],
            capture_output=True,
            text=True,
            env={
                **os.environ,
                **{name: str(path) for name, path in folders.items()},
                "LOG": str(log),
                "FAIL": fail,
                "PATH": f"{stub.parent}:{os.environ['PATH']}",
            },
        )
        return done.returncode, done.stdout + done.stderr, log.read_text()

    return run


def test_a_failure_in_a_stage_costs_what_that_stage_had_not_done(reproduce):
    status, screen, log = reproduce("--jobs=1", fail="dino.yaml")
    assert status == 1
    assert "stage 6, Stage I by other methods: not known before" in screen
    # Before each stage what it takes, of two processes as the check said.
    assert "-- stage 4, Stage I: about 2.0 h\n" in screen
    assert "-- stage 5, Stage II: about 3.0 h\n" in screen
    assert "-- stage 6, Stage I by other methods: about 2.5 h\n" in screen
    assert log.splitlines()[-1].startswith("train_lgl.py")
    status, screen, log = reproduce("--jobs=1")
    assert status == 0, screen
    assert "stage 5, stage2: done" in screen and "stage1.yaml" not in log
    # 1,002 utterances of 36 s by four encoders, each twice.
    assert "-- stage 7, scores: about 0.8 h\n" in screen
    assert "-- stage 8, the paper's tables: about 9.0 h\n" in screen
    verbs = re.findall(
        r"^(?:-m lgl_plugin|paper\.py|reproduce\.py) \w+", log, re.M
    )
    of_one = ["export", "export", "verify"]  # the last epoch's, and the mean
    assert verbs == [
        *(f"-m lgl_plugin {verb}" for verb in 4 * of_one),
        "paper.py table1",
        "reproduce.py results",
    ]
    (line,) = (x for x in log.splitlines() if "verify" in x and "dino" in x)
    lists = re.findall(r"lists/(\w+)\.txt", line)
    assert lists == ["veri_test2", "list_test_all2", "list_test_hard2"]
    assert "--cohort=" in line
    status, screen, log = reproduce()
    assert (status, log) == (0, "")
    # Another cohort is another score, and no other training.
    status, screen, log = reproduce("--top=99")
    assert status == 0 and "train_lgl" not in log
    assert log.count("--top=99") == 4 and "reproduce.py results" in log
    # Other methods are other work; the paper's stages are none of it.
    status, screen, log = reproduce("--methods=moco", "--stop_stage=6")
    trained = [line for line in log.splitlines() if "train_lgl" in line]
    assert len(trained) == 1 and "moco.yaml" in trained[0]


def test_stages_by_number_and_options_of_the_recipe(reproduce):
    status, screen, log = reproduce(
        "--stage", "4", "--stop_stage", "5", "--", "--precision=fp32"
    )
    assert status == 0, screen
    first, second = log.splitlines()
    assert "stage1.yaml" in first and "stage2.yaml" in second
    for line in (first, second):
        assert " --precision=fp32 " in line and "--batch_size=8" in line
        assert "--output_folder=" in line and "/paper/seed1/base" in line
    status, screen, log = reproduce("--methods=mocoo")
    assert (status, log) == (1, "") and "mocoo.yaml" in screen
    status, screen, log = reproduce("--stop_stagee=5")
    assert status == 2 and "no option --stop_stagee" in screen


def test_a_mistyped_option_is_refused_before_any_stage(monkeypatch, capsys):
    """One of a training, too, which begins hours later."""
    for work, typed, problem in (
        ("settings", "--batchsize=8", "'batchsize'; did you mean 'batch_size'"),
        ("settings", "0.1", "0.1: give settings as --key=value"),
        # reproduce.sh adds it to each training.
        ("settings", "--seed=3", "--seed is given twice"),
        ("hours", "--off=3", "unrecognized arguments: --off=3"),
    ):
        folders = ["--archives=a", "--data=d", "--exp=e", "--methods=moco"]
        words = ["reproduce.py", work, *folders, typed]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as end:
            script.main()
        assert problem in f"{end.value}{capsys.readouterr().err}"
    typed = ["--data_folder=/x", "--precision=fp32", "--device=cpu"]
    words[1:] = ["settings", *folders, *typed]
    script.main()


def test_each_training_is_timed(monkeypatch, tmp_path, capsys):
    """By sessions on a few files, of which only the steps are made up."""
    audio = tmp_path / "vox2" / "wav" / "id0" / "a"
    audio.mkdir(parents=True)
    wav = np.random.default_rng(0).normal(size=16000) / 9
    for name in range(900):
        soundfile.write(audio / f"{name}.wav", wav, 16000)
    (tmp_path / "lists").mkdir()
    trials = tmp_path / "lists" / "veri_test2.txt"
    trials.write_text("1 id1/a/1.wav id1/a/2.wav\n0 id1/a/1.wav id2/a/1.wav\n")
    seen = []

    def cost(session, made):
        seen.append((session.settings.stage, session.batch_size))
        return {"embedding": 1.0}

    for stage in (1, 2):
        name = f"lgl_plugin.cli.cost.cost_of_stage{stage}"
        monkeypatch.setattr(name, cost)
    given = options(tmp_path)
    vars(given).update(nproc=1, methods=["moco"], hparams=RECIPE / "hparams")
    words = ["--dataloader_options={num_workers: 0}", "--device=cpu"]
    words += [f"--data_folder={tmp_path / 'vox2'}"]
    words += [f"--manifest={tmp_path / 'manifest.csv'}"]
    try:
        script.check(given, words)
    finally:  # it silences its process, which here has other tests to come
        logging.disable(logging.NOTSET)
    capsys.readouterr()
    assert [stage for stage, _ in seen] == [1, 2, 1]
    costs = json.loads((tmp_path / "costs.json").read_text())
    assert [*costs["stages"]] == ["stage1", "stage2", "moco"]
    assert costs["kept"] == 900


def options(folder):
    """The parsed options of the script."""
    return script.argparse.Namespace(
        archives=folder / "downloads",
        data=folder,
        exp=folder,
        average=10,
        jobs=1,
    )


def test_archives_are_unpacked_and_what_is_whole_is_left(tmp_path):
    written = make_archives(
        tmp_path / "downloads", speakers=1, encode=lambda wav: wav
    )
    script.unpack(options(tmp_path), [])
    found = {
        str(path.relative_to(tmp_path))
        for path in tmp_path.rglob("*.[wm][a4][va]")
    }
    own = [n for n in written if n.startswith(("musan", "RIRS"))]
    assert found >= set(own) and len(found) == len(written)
    utterance = tmp_path / "vox2/aac/id00012/v0000000002/00005.m4a"
    whole = utterance.read_bytes()
    assert whole[:4] == b"RIFF" and len(whole) > 16000
    other = tmp_path / "vox1/wav/id10273/v0000000001/00003.wav"
    utterance.write_bytes(whole[:99])  # torn by a power cut
    before = other.stat().st_mtime_ns
    script.unpack(options(tmp_path), [])
    assert utterance.read_bytes() == whole
    assert other.stat().st_mtime_ns == before
    (tmp_path / "downloads" / "vox2_dev_aac_partac").unlink()
    with pytest.raises(FileNotFoundError, match="no vox2_dev_aac_partac"):
        script.unpack(options(tmp_path), [])
    for part in (tmp_path / "downloads").glob("vox2_dev_aac_parta[d-h]"):
        part.unlink()
    with pytest.raises(ValueError, match="is a part missing"):
        script.unpack(options(tmp_path), [])
    (tmp_path / "downloads" / "musan.tar.gz").unlink()
    with pytest.raises(FileNotFoundError, match="no musan.tar.gz"):
        script.unpack(options(tmp_path), [])


def test_results_and_model_cards(tmp_path, capsys):
    """From what `lgl verify` leaves, twice: a card has one table."""
    (tmp_path / "costs.json").write_text(json.dumps(COSTS))
    rate = {"eer": 1.834, "min_dcf_001": 0.2}
    for name in script.LISTS:
        path = tmp_path / "scores" / "sdpn" / name / "metrics.json"
        path.parent.mkdir(parents=True)
        scores = {
            f"{model}, {kind}": rate
            for model in ("sdpn", "sdpn-average")
            for kind in ("cosine", "AS-norm")
        }
        path.write_text(json.dumps({"scores": scores}))
    for model in ("sdpn", "sdpn-average"):
        card = tmp_path / "models" / model / "README.md"
        card.parent.mkdir(parents=True)
        card.write_text("# A model\n")
    given = options(tmp_path)
    given.methods = ["sdpn"]
    script.results(given, [])
    script.results(given, [])
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| sdpn, average | sdpn.yaml | 1.83 | 1.83 |" in text
    assert "1.80 to 1.88, 1.99, 3.62 (3D-Speaker)" in text
    assert card.read_text().count("## Results on VoxCeleb1") == 1
    assert "| Vox1-H, AS-norm | 1.83 | 0.200 |" in card.read_text()
    given.average = 1  # its mean is of earlier settings
    script.results(given, [])
    assert "sdpn, average" not in (tmp_path / "RESULTS.md").read_text()


def test_a_few_files_that_cannot_be_read_do_not_stop_a_second_start(
    tmp_path, monkeypatch
):
    """The limit is 1 % of all files, not of those that still wait."""
    (tmp_path / "vox2" / "aac").mkdir(parents=True)
    (tmp_path / "vox2" / "wav").mkdir()
    for n in range(100):
        (tmp_path / "vox2" / "aac" / f"{n}.m4a").touch()
        if n > 1:
            (tmp_path / "vox2" / "wav" / f"{n}.wav").touch()
    monkeypatch.setattr(archives.shutil, "which", lambda name: name)
    monkeypatch.setattr(archives, "convert_one", lambda pair: "bad")
    with pytest.raises(ValueError, match="2 of 100 files"):
        script.convert(options(tmp_path), [])
    (tmp_path / "vox2" / "wav" / "1.wav").touch()
    script.convert(options(tmp_path), [])
    assert (tmp_path / "not_converted.txt").read_text() == "bad"


def test_a_slurm_job_has_its_cores_and_its_own_copy_of_the_shards(tmp_path):
    (tmp_path / "srun").write_text(
        '#!/bin/bash\necho "$SRUN_CPUS_PER_TASK" "$@" >>log\n'
    )
    (tmp_path / "scontrol").write_text("#!/bin/bash\necho node7\n")
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1"}
    job |= {"SLURM_JOB_NODELIST": "node7", "SLURM_CPUS_PER_TASK": "64"}
    job |= {"SLURM_TMPDIR": "/own", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    copies = set()
    for shards in ("/shared/one", "/shared/two"):
        subprocess.run(
            ["bash", RECIPE / "slurm.sh", "train_lgl.py"],
            cwd=tmp_path,
            env={**os.environ, **job, "SHARDS": shards},
            check=True,
        )
        copy, train = (tmp_path / "log").read_text().splitlines()[-2:]
        found = re.fullmatch(rf"64 rsync -rt {shards}/ (/own/\S+)", copy)
        assert f"--data_folder={found[1]} " in train
        assert train.startswith("64 ")
        copies.add(found[1])
    assert len(copies) == 2


SLURM = {
    "srun": 'echo "$@" >srun; shift; echo $$ >pid; exec sleep 60',
    "scancel": 'kill -TERM "$(<pid)"',
    "scontrol": '[[ $1 == show ]] && echo node7 || echo "$@" >scontrol',
}


@pytest.mark.parametrize("number, restarted", [("USR1", True), ("TERM", False)])
def test_a_slurm_job_whose_time_is_up_is_put_back(tmp_path, number, restarted):
    """USR1 comes first; a step that fails in its first minutes stays."""
    (tmp_path / "bin").mkdir()
    for name, text in SLURM.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
    job |= {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_GPUS_ON_NODE": "8"}
    path = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        ["bash", RECIPE / "slurm.sh", "train_lgl.py", "hparams/stage1.yaml"],
        cwd=tmp_path,
        env={**os.environ, **job, **path},
    )
    pid = tmp_path / "pid"
    while not (pid.exists() and pid.read_text().endswith("\n")):
        time.sleep(0.02)
    if restarted:
        process.send_signal(signal.SIGUSR1)
    else:
        os.kill(int(pid.read_text()), signal.SIGTERM)
    status = process.wait(30)
    words = (tmp_path / "srun").read_text()
    assert "--nnodes=2 --nproc_per_node=8" in words
    assert "--rdzv_endpoint=node7:10007 train_lgl.py" in words
    called = tmp_path / "scontrol"
    if restarted:
        assert status == 0 and called.read_text() == "requeue 7\n"
    else:
        assert status == 143 and not called.exists()
