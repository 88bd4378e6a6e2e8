#!/bin/bash
# A run on the eight GPUs of one node. From the project's folder, with what train.py takes:
#     sbatch scripts/slurm/one_node.sh experiment=pascal_invpt_vit_large data.root=$DATA data.batch_size=16
#SBATCH --job-name=mtcl
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=400G
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.out --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
# The last line: three minutes before the time is over this script is told, and tells the processes to save.

[ -f .venv/bin/activate ] && source .venv/bin/activate
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / SLURM_GPUS_ON_NODE))
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150 # seconds that torchrun gives them to save

# torchrun exits with 1, whatever its processes exit with: what was asked for is noted here.
trap 'preempted=yes; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1

srun torchrun --standalone --nproc-per-node="$SLURM_GPUS_ON_NODE" --max-restarts=3 \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    train.py hydra.run.dir="outputs/slurm/$SLURM_JOB_ID" resume=auto "$@" &
wait $!
code=$?
if [ "$preempted" ]; then # wait was interrupted by the signal
    wait $!
    code=$?
    [ $code = 0 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
