#!/bin/bash
# One run on a Slurm cluster, over as many jobs as it takes. From the root of the repo, with
# train.py's settings:
#     sbatch --nodes=2 --gpus-per-node=8 --cpus-per-task=64 --time=04:00:00 dev/slurm.sh \
#         --model=1b --out=runs/1b ...
# Five minutes before the time limit the run is told to save; then the job goes back into the queue
# and starts again from the checkpoint. A job that ends by itself, well or not, or is cancelled, is
# not queued again.
#
# A table is an array of jobs with one GPU each, which share its runs; those that are killed are
# submitted again:
#     sbatch --array=1-8 --gpus=1 --cpus-per-task=8 --wrap="make gap SCALE=60m TUNE=1 JOBS=1"
#SBATCH --ntasks-per-node=1 --requeue --open-mode=append --signal=B:USR1@300
#SBATCH --output=slurm-%j.log

trap 'stopped=1; scancel --signal=TERM "$SLURM_JOB_ID.0"' USR1  # srun itself would kill its tasks
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=270  # torchrun's patience with what it stops, in seconds
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" .venv/bin/torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d \
    --rdzv_endpoint="$first:$((20000 + SLURM_JOB_ID % 10000))" train.py "$@" &
wait $!
status=$?
if [ -n "$stopped" ]; then
    wait  # the signal ended the first wait; now the run has saved
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
