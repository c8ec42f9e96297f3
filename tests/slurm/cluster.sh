#!/usr/bin/env bash
# A SLURM cluster of three nodes on this one machine, for tests:
#   bash tests/slurm/cluster.sh install | start FOLDER | stop FOLDER
#   install       Debian's slurm-wlm and munge, through apt, where they are not there already
#   start FOLDER  configuration, state, logs and sockets lie in FOLDER; prints the SLURM_CONF to export
#   stop FOLDER   ends its jobs and daemons
# Its nodes have addresses of this machine as their names, which need no resolver. Needs root. Exit code 77 where there
# can be no SLURM: not root, no apt, no network.
set -euo pipefail
nodes=(127.0.0.2 127.0.0.3 127.0.0.4)  # partitions low, patient and high have the first, nodes has all
export PATH="$PATH:/usr/sbin:/sbin"  # where Debian puts daemons, and a user's PATH may not look

cannot() { echo "no SLURM here: $*" >&2; exit 77; }

installed() { command -v slurmctld && command -v slurmd && command -v munged && command -v sbatch; } >/dev/null

install() {
    installed && return
    command -v apt-get >/dev/null || cannot "it is not installed, and this system has no apt-get"
    log=$(mktemp)
    # the packages would start daemons of their own; retries would only make a machine without network wait
    quick="-q -o Acquire::Retries=0 -o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20 -o DPkg::Lock::Timeout=60"
    export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
    { timeout 120 apt-get $quick update && timeout 300 apt-get $quick install --yes --no-install-recommends slurm-wlm munge; } \
        >"$log" 2>&1 || { tail -3 "$log" >&2; cannot "apt-get could not install slurm-wlm and munge, see $log"; }
    rm "$log"
    installed || cannot "slurm-wlm and munge are installed, but their programs are not found"
}

free_ports() {
    python3 -c '
import socket
sockets = [socket.socket() for _ in range(4)]
for one in sockets:
    one.bind(("127.0.0.1", 0))
print(*(one.getsockname()[1] for one in sockets))'
}

start() {
    installed || cannot "it is not installed; bash tests/slurm/cluster.sh install"
    stop  # what an earlier start left behind
    rm -rf "$folder"/{state,spool}
    mkdir -p "$folder"/{state,spool}
    (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
    read -r controller_port ports < <(free_ports)
    node=$(hostname -s)
    cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$node(127.0.0.1)
SlurmctldPort=$controller_port
SlurmUser=root
AuthType=auth/munge
# a requeued job waits until its credential has expired: 5 seconds instead of 120
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
# what works without cgroups, in containers too
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
KillWait=20
# a test that sets a time limit need not be quicker than it
OverTimeLimit=30
# as many tasks as tests want, whatever the machine has
SlurmdParameters=config_overrides
# a node that does not answer is down
SlurmdTimeout=10
PartitionName=DEFAULT Nodes=${nodes[0]} MaxTime=INFINITE State=UP
PartitionName=low Default=YES PriorityTier=1 PreemptMode=REQUEUE
PartitionName=patient PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high PriorityTier=10 PreemptMode=OFF
PartitionName=nodes Nodes=$(IFS=,; echo "${nodes[*]}")
CONF
    for name in "${nodes[@]}"; do
        echo "NodeName=$name NodeHostname=$node Port=${ports%% *} CPUs=4 RealMemory=4000 State=UNKNOWN"
        ports=${ports#* }
    done >>"$folder/slurm.conf"
    export SLURM_CONF="$folder/slurm.conf"
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munged.seed" 2>"$folder/munged.err"
    slurmctld -c -f "$SLURM_CONF" >"$folder/slurmctld.out" 2>&1
    for name in "${nodes[@]}"; do slurmd -c -f "$SLURM_CONF" -N "$name" >"$folder/slurmd-$name.out" 2>&1; done
    for _ in $(seq 300); do
        if [ "$(sinfo --noheader --partition nodes --format %t 2>/dev/null)" = idle ]; then
            echo "$SLURM_CONF"
            return
        fi
        sleep 0.1
    done
    tail -n 5 "$folder"/*.log >&2
    stop
    cannot "its daemons do not come up; see the logs in $folder"
}

stop() {
    if [ -s "$folder/slurmctld.pid" ]; then
        SLURM_CONF="$folder/slurm.conf" timeout 10 scancel --quiet --full --signal=KILL --user=root 2>/dev/null || true
        SLURM_CONF="$folder/slurm.conf" timeout 10 scancel --quiet --user=root 2>/dev/null || true
    fi
    for daemon in "${nodes[@]/#/slurmd-}" slurmctld munged; do
        # a process id may be another's by now
        pid=$(cat "$folder/$daemon.pid" 2>/dev/null) || continue
        if [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "${daemon%%-*}" ]; then
            kill "$pid"
            for _ in $(seq 100); do [ -e "/proc/$pid" ] || break; sleep 0.1; done
        fi
        rm -f "$folder/$daemon.pid"
    done
}

[ "$(id -u)" = 0 ] || cannot "its daemons need root"
case "${1:-} $#" in
    "install 1") install ;;
    "start 2" | "stop 2") mkdir -p "$2"; folder=$(cd "$2" && pwd); "$1" ;;
    *) sed -n '2,8s/^# //p' "$0" >&2; exit 2 ;;
esac
