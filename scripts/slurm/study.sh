#!/bin/bash
# One run of a study on one GPU: an element of the array that this command submits, once it has the cluster's lines:
#     python scripts/study.py STUDY.yaml --output FOLDER --launcher slurm [--jobs N] [overrides ...]
#SBATCH --job-name=study
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=48G
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%A_%a.out --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@120
# The last line: two minutes before the time is over the run is told to save. Add the cluster's --partition, --account.

[ -f .venv/bin/activate ] && source .venv/bin/activate
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

srun python scripts/study.py "$@" --run "$SLURM_ARRAY_TASK_ID"
code=$?
# 75: the run has saved. 138: the signal ended it before it could, as it was only starting.
# The last element has the array's own number: SLURM_JOB_ID would requeue them all.
if [ $code = 75 ] || [ $code = 138 ]; then scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"; fi
exit $code
