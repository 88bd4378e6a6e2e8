#!/usr/bin/env bash
# A Slurm of two nodes on this machine, to try sweeps and batch files without a cluster:
#
#     scripts/dev/slurm.sh start [FOLDER]    # munge, slurmctld and a slurmd for each node, on 127.0.0.1
#     export SLURM_CONF=FOLDER/slurm.conf PATH=FOLDER/bin:$PATH    # sinfo, sbatch, srun, scancel talk to it
#     scripts/dev/slurm.sh status [FOLDER]
#     scripts/dev/slurm.sh stop [FOLDER]     # ends the jobs, too; the folder stays
#
# It needs the programs only (Debian, Ubuntu: apt-get install slurm-wlm munge), no service, no file outside FOLDER
# (default: slurm-UID in the folder of temporary files) and no root. The nodes claim more cores, memory and GPUs (8 each,
# of which none exists) than the machine has, so that batch files for a cluster are accepted as they are. A node that was
# killed is back after another `start`.
set -euo pipefail

command=${1:-} folder=${2:-${TMPDIR:-/tmp}/slurm-$(id -u)}
nodes=(node1 node2)
PATH=$PATH:/usr/sbin:/sbin # where Debian keeps the daemons

fail() {
    echo "error: $*" >&2
    exit 1
}

# The process of FOLDER/run/NAME.pid; nothing where it has ended.
pid_of() {
    local pid
    pid=$(cat "$folder/run/$1.pid" 2>/dev/null) && kill -0 "$pid" 2>/dev/null && echo "$pid"
}

# Several TCP ports in a row that nothing listens on: the first one.
free_ports() {
    local first port
    for _ in {1..100}; do
        first=$((20000 + RANDOM % 12000))
        for port in $(seq "$first" $((first + $1 - 1))); do
            (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null && continue 2
        done
        echo "$first" && return
    done
    fail "no free ports on 127.0.0.1; end what occupies them"
}

write_config() {
    local port host user number=0
    port=$(free_ports $((${#nodes[@]} + 1))) host=$(hostname -s) user=$(id -un)
    cat <<END
ClusterName=mtcl
SlurmctldHost=$host(127.0.0.1)
SlurmUser=$user
SlurmdUser=$user
SlurmctldPort=$port
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/munge/socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
GresTypes=gpu
MailProg=/bin/true
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# What is slow by default: a dead node is noticed after seconds, a job requeued at once, an ended one forgotten late.
SlurmdTimeout=8
SlurmctldTimeout=10
KillWait=20
MinJobAge=3600
ReturnToService=2
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
JobRequeue=1
END
    for node in "${nodes[@]}"; do
        number=$((number + 1))
        echo NodeName=$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + number)) \
            "CPUs=64 Boards=1 SocketsPerBoard=1 CoresPerSocket=64 ThreadsPerCore=1 RealMemory=1000000 Gres=gpu:8"
    done
    echo "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP"
}

# No accounting, which needs a database: what submitit asks sacct for comes from squeue, which keeps jobs for an hour.
write_sacct() {
    cat <<'END'
#!/usr/bin/env bash
jobs=$(while [ $# -gt 0 ]; do [ "$1" != -j ] || echo "$2"; shift; done | paste -sd,)
echo "JobID|State|NodeList"
squeue --noheader --states=all --format="%i|%T|%N" --jobs="$jobs"
END
}

start() {
    local program node plugin
    for program in munged mungekey slurmctld slurmd sinfo; do
        command -v $program >/dev/null || fail "$program is missing; apt-get install slurm-wlm munge"
    done
    mkdir -p "$folder"
    folder=$(cd "$folder" && pwd)
    (umask 077 && mkdir -p "$folder"/{state,spool,run,log,key})
    mkdir -p "$folder"/{munge,bin} && chmod 755 "$folder" "$folder/munge"
    [ -f "$folder/key/munge.key" ] || mungekey --create --keyfile="$folder/key/munge.key" --bits=1024
    export SLURM_CONF=$folder/slurm.conf
    if [ -z "$(pid_of slurmctld)" ]; then
        write_config >"$SLURM_CONF"
        touch "$folder"/run/gpu{0..7}
        echo "Name=gpu File=$folder/run/gpu[0-7]" >"$folder/gres.conf"
        plugin=cgroup/v1 # loaded, not used; Slurm 24 and later need none
        [[ $(slurmd -V) =~ ([0-9]+)\. && ${BASH_REMATCH[1]} -lt 24 ]] || plugin=disabled
        echo "CgroupPlugin=$plugin" >"$folder/cgroup.conf"
        write_sacct >"$folder/bin/sacct" && chmod +x "$folder/bin/sacct"
    fi
    [ -n "$(pid_of munged)" ] || munged --key-file="$folder/key/munge.key" --socket="$folder/munge/socket" \
        --pid-file="$folder/run/munged.pid" --log-file="$folder/log/munged.log" --seed-file="$folder/key/munged.seed"
    [ -n "$(pid_of slurmctld)" ] || slurmctld -f "$SLURM_CONF"
    for node in "${nodes[@]}"; do
        [ -n "$(pid_of "$node")" ] || slurmd -f "$SLURM_CONF" -N "$node"
    done
    for _ in {1..150}; do
        [ "$(sinfo --noheader --Node --states=idle,alloc,mix --responding | wc -l)" = ${#nodes[@]} ] && break
        sleep 0.2
    done
    status
}

status() {
    local program
    [ -f "$folder/slurm.conf" ] || fail "$folder has no Slurm; scripts/dev/slurm.sh start $folder"
    for program in munged slurmctld "${nodes[@]}"; do
        [ -n "$(pid_of "$program")" ] || fail "$program does not run; scripts/dev/slurm.sh start $folder, or look at $folder/log"
    done
    echo "export SLURM_CONF=$folder/slurm.conf PATH=$folder/bin:\$PATH"
    SLURM_CONF=$folder/slurm.conf sinfo
}

stop() {
    local program pid
    export SLURM_CONF=$folder/slurm.conf
    if [ -n "$(pid_of slurmctld)" ]; then # jobs that outlive it would wait for it for ever
        scancel --quiet --user="$(id -un)" || true
        for _ in {1..100}; do [ -n "$(squeue --noheader)" ] || break; sleep 0.2; done
        sleep 1
    fi
    for program in slurmctld "${nodes[@]}" munged; do
        pid=$(pid_of "$program") || continue
        kill "$pid"
        for _ in {1..50}; do kill -0 "$pid" 2>/dev/null || continue 2; sleep 0.1; done
        kill -KILL "$pid"
    done
}

case $command in
    start | stop | status) $command ;;
    *) fail "which of start, stop, status? usage: scripts/dev/slurm.sh start|stop|status [FOLDER]" ;;
esac
