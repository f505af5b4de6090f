#!/bin/bash
# One run on a Slurm cluster, over as many jobs as it takes. From this folder, with train.py's settings:
#     sbatch --nodes=2 --gpus-per-node=8 --time=04:00:00 slurm.sh --model=1b --data=data/c4 --out=runs/1b ...
# Five minutes before the time limit the run is told to save; then the job goes back into the queue and starts again
# from the checkpoint. A job that ends by itself, well or not, is not queued again.
#SBATCH --ntasks-per-node=1 --requeue --open-mode=append --signal=B:TERM@300 --output=slurm-%j.log

trap 'stopped=1; kill -TERM "$step"' TERM
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun .venv/bin/torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$head:29500" train.py "$@" &
step=$!
wait "$step"
status=$?
if [ -n "$stopped" ]; then
    wait "$step"  # the signal ended the first wait; now the run has saved
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
