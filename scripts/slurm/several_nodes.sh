#!/bin/bash
# A run on the GPUs of several nodes. From the project's folder, which all nodes see, with what train.py takes:
#     sbatch --nodes=4 scripts/slurm/several_nodes.sh experiment=pascal_invpt_vit_large data.root=$DATA data.batch_size=32
#SBATCH --job-name=mtcl
#SBATCH --nodes=2
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
export MEETING_PORT=$((20000 + SLURM_JOB_ID % 10000))

# torchrun exits with 1, whatever its processes exit with: what was asked for is noted here.
trap 'preempted=yes; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1

# One torchrun on each node; they meet at this one, the first.
srun bash -c 'exec torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" --max-restarts=3 \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$SLURM_LAUNCH_NODE_IPADDR:$MEETING_PORT" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 "$@"' torchrun \
    train.py hydra.run.dir="outputs/slurm/$SLURM_JOB_ID" resume=auto "$@" &
wait $!
code=$?
if [ "$preempted" ]; then # wait was interrupted by the signal
    wait $!
    code=$?
    [ $code = 0 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
