#!/usr/bin/env bash
# A command of the recipe on the machines of a Slurm job, a process for each
# GPU. docs/several_gpus.md says what it does when the job is cut short.
#
#   sbatch --nodes=2 slurm.sh train_lgl.py hparams/stage1.yaml \
#       --data_folder=/path/to/VoxCeleb --batch_size=16  # 256 in all
#   SHARDS=/path/to/shards sbatch slurm.sh train_lgl.py hparams/stage1.yaml \
#       --batch_size=32
#
#SBATCH --job-name=lgl
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
set -euo pipefail
# Since Slurm 22.05 srun no longer takes this from sbatch: one core for all.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

# With SHARDS, what `lgl pack` wrote, each machine reads a copy of its own.
# rsync renames what is whole, so no torn copy of a killed job is kept.
if [[ -n ${SHARDS:-} ]]; then
    copy=shards-$(id -un)-$(printf %s "$SHARDS" | cksum | cut -d' ' -f1)
    copy=${SLURM_TMPDIR:-/tmp}/$copy
    srun rsync -rt "$SHARDS/" "$copy"
    set -- "$@" --data_folder="$copy" --manifest="$copy/manifest.csv"
fi

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
again=
# Slurm gives it 180 s before the job's time is up; the trainings write a
# checkpoint and end.
trap 'again=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

# Where a process fails, all machines end, and do not wait for it.
srun --kill-on-bad-exit=1 torchrun --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" --rdzv_backend=c10d \
    --rdzv_id="$SLURM_JOB_ID" \
    --rdzv_endpoint="$first:$((10000 + SLURM_JOB_ID % 50000))" "$@" &
status=0
wait "$!" || status=$?
# A signal that has come ends the first wait, and not what was waited for.
wait "$!" 2>/dev/null || status=$?

# What is wrong with a command shows in the first minutes. Later a machine or
# a process was lost, or the job preempted: the same command goes on.
if ((status != 0 && SECONDS > 600 && ${SLURM_RESTART_COUNT:-0} < 20)); then
    again=1
fi
[[ -z $again ]] || exec scontrol requeue "$SLURM_JOB_ID"
exit "$status"
