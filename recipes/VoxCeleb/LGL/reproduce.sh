#!/usr/bin/env bash
# From the downloaded archives to Vox1-O, E and H of every method, and to the
# paper's tables. What is done is not done again: after a kill, start the same
# command. docs/voxceleb.md has the archives' names.
#
#   bash reproduce.sh --archives /path/to/downloads --data /path/to/data
#   bash reproduce.sh --archives … --data … --stage 4 --stop_stage 5 --nproc 8
#
# 1 unpack       archives to wav and m4a
# 2 convert      VoxCeleb2's m4a to wav, by ffmpeg
# 3 check        list the audio, time steps of every yaml: the hours of 4 to 8
# 4 stage1       Stage I of the paper
# 5 stage2       Stage II of the paper
# 6 methods      Stage I by the other methods
# 7 score        export, average checkpoints, score Vox1-O, E and H
# 8 tables       the paper's tables and figures
# 9 results      RESULTS.md and the model cards
#
# Options, as --name value; what follows -- goes to every training:
set -euo pipefail

archives=            # folder of the downloads
data=data            # where the audio goes, 400 GB
exp=results/voxceleb # runs, models, scores, RESULTS.md
stage=1              # the first stage
stop_stage=9         # the last one
methods="moco vicreg dino rdino sdpn" # of stage 6, by their yamls
seeds=1              # of the paper's tables: 1,2,3; the first is also stage 4's
average=10           # epochs in the mean of the weights, scored beside the last
nproc=1              # GPUs of this machine
jobs=$(getconf _NPROCESSORS_ONLN) # ffmpeg processes
workers=8            # processes that read audio for scoring
device=              # cpu, cuda:1; none: the GPU if there is one
top=300              # nearest of the cohort that count in AS-norm
hparams=             # folder of the yamls, if they are yours
# end of the options

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
usage() { sed -n '2,/^# end of the options/{/^set /d;/^# end/d;p}' "$0"; }
names=$(sed -n '/^archives=/,/^# end/s/^\([a-z_]*\)=.*/\1/p' "$0")
while [[ ${1:-} == --* ]]; do
    word=${1#--} && shift
    [[ -n $word ]] || break
    [[ $word != help ]] || { usage; exit; }
    if [[ $word == *=* ]]; then
        set -- "${word#*=}" "$@"
        word=${word%%=*}
    fi
    if ! grep -qx -- "$word" <<<"$names" || (($# == 0)); then
        echo "$0: there is no option --$word, or it lacks a value; see --help" >&2
        exit 2
    fi
    printf -v "$word" %s "$1" && shift
done
[[ -n $archives ]] || { echo "$0: --archives is missing; see --help" >&2; exit 2; }
hparams=${hparams:-$here/hparams}
seed=${seeds%%,*}
mkdir -p "$data" "$exp/done"
data=$(cd "$data" && pwd)
exp=$(cd "$exp" && pwd)

# What it starts inherits the lock, but for the workers of torchrun and the
# trainings of paper.py: each has a lock of its own in its run folder.
exec 9>"$exp/lock"
flock -n 9 || { echo "$0: another run, or what it started, is at work in $exp" >&2; exit 1; }

lists=("$data"/lists/{veri_test2,list_test_all2,list_test_hard2}.txt)
base=$exp/paper/seed$seed/base # where paper.py looks for it
on=()
[[ -z $device ]] || on=(--device="$device")
common=(
    --data_folder="$data/vox2" --manifest="$exp/manifest.csv"
    --verification_file="${lists[0]}" --trial_folder="$data/vox1/wav"
    --musan_folder="$data/musan" --rir_folder="$data/RIRS_NOISES"
    --keep_checkpoints="$average" "${on[@]}" "$@"
)
mine() { python "$here/reproduce.py" "$1" --archives="$archives" --data="$data" \
    --exp="$exp" --hparams="$hparams" --methods="$methods" --seeds="$seeds" \
    --nproc="$nproc" --jobs="$jobs" --average="$average" "${@:2}"; }

train() { # yaml, run, further options
    local launch=(python) size
    ((nproc == 1)) || launch=(torchrun --standalone --nproc_per_node="$nproc")
    size=$(mine batch "$1")
    "${launch[@]}" "$here/train_lgl.py" "$hparams/$1.yaml" "${common[@]}" \
        --output_folder="$2" --seed="$seed" --batch_size="$size" "${@:3}"
}

score() { # name, run, step
    local out=$exp/scores/$1 models=("$exp/models/$1")
    local settings="$2 $3 $average $top"
    [[ ! -e $out/done || $(<"$out/done") != "$settings" ]] || return 0
    python -m lgl_plugin export "$2" "$3" --output="${models[0]}" "${on[@]}"
    if ((average > 1)); then
        models+=("$exp/models/$1-average")
        python -m lgl_plugin export "$2" "$3" --output="${models[1]}" \
            --average="$average" "${on[@]}"
    fi
    python -m lgl_plugin verify "${models[@]}" "$data/vox1/wav" \
        --trials "${lists[@]}" --cohort="$data/vox2/wav" --top="$top" \
        --num_workers="$workers" --output_folder="$out" "${on[@]}"
    printf '%s\n' "$settings" >"$out/done"
}

unpack() { mine unpack; }
convert() { mine convert; }
check() {
    mine check "${common[@]}"
    mine hours
}
# The study's figures of each epoch are those that the paper's tables want.
stage1() { train stage1 "$base" --selection_study=True; }
stage2() { train stage2 "$base"; }
methods() {
    local name
    for name in $methods; do train "$name" "$exp/runs/$name"; done
}
score_all() {
    local name last
    last=$(mine last) # as iter5/gated
    score stage1 "$base" stage1
    score stage2 "$base" "$last"
    for name in $methods; do score "$name" "$exp/runs/$name" stage1; done
}
tables() {
    local size
    size=$(mine batch stage2)
    python "$here/paper.py" table1 table2 table3 table4 figure2 figure3 \
        --hparams="$hparams" --output_folder="$exp/paper" --seeds="$seeds" \
        --nproc="$nproc" --batch_size="$size" "${common[@]}" \
        --lists O="${lists[0]}@$data/vox1/wav" E="${lists[1]}@$data/vox1/wav" \
        H="${lists[2]}@$data/vox1/wav"
}
results() { mine results; }

run() { # number, command, what it depends on; done once for that
    local number=$1 mark=$exp/done/$1 started=$SECONDS
    ((number >= stage && number <= stop_stage)) || return 0
    if [[ -e $mark && $(<"$mark") == "$3" ]]; then
        echo "stage $number, $2: done; to do it again, remove $mark"
        return 0
    fi
    echo "-- $(mine hours --of="$number")"
    "$2"
    printf '%s\n' "$3" >"$exp/done/.$number"
    mv "$exp/done/.$number" "$mark"
    echo "stage $number, $2: done after $(((SECONDS - started + 59) / 60)) min"
}

# What is wrong with an option shows now, and not after hours.
mine settings "${common[@]}"
if ((stage <= 2 && stop_stage >= 2)) && [[ ! -e $exp/done/2 ]] &&
    ! command -v ffmpeg >/dev/null; then
    echo "$0: ffmpeg, which stage 2 reads m4a with, is not installed" >&2
    exit 1
fi
mine hours
run 1 unpack "$archives"
run 2 convert ""
run 3 check "$methods $nproc"
run 4 stage1 "$seed"
run 5 stage2 "$seed"
run 6 methods "$methods"
run 7 score_all "$methods $average $seed $top"
run 8 tables "$seeds"
run 9 results "$methods $average $seeds $top"
