#!/bin/bash
# A run on one GPU. From the project's folder, with what train.py takes:
#     sbatch scripts/slurm/one_gpu.sh experiment=nyud_invpt_vit_base data.root=$DATA backbone.weights=$WEIGHTS
#SBATCH --job-name=mtcl
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=48G
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.out --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@120
# The last line: two minutes before the time is over the run is told to save. Add the cluster's --partition, --account.

[ -f .venv/bin/activate ] && source .venv/bin/activate
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# A requeued job keeps its number, and so finds its checkpoints.
srun python train.py hydra.run.dir="outputs/slurm/$SLURM_JOB_ID" resume=auto "$@"
code=$?
# 75: it has saved. 138: the signal ended it before it could, as it was only starting.
if [ $code = 75 ] || [ $code = 138 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
