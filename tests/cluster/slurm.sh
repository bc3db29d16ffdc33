#!/usr/bin/env bash
# A real Slurm of two nodes on this host, in a private state directory, on free loopback ports, with its own munge.
#
#   slurm.sh start DIR [OWNER_PID]   returns once both nodes are idle; it ends by itself when OWNER_PID is gone
#   slurm.sh stop DIR                cancels all jobs and leaves no process; DIR and its logs stay
#
# Both may be repeated. Clients find the cluster through SLURM_CONF=DIR/slurm.conf. Needs root, slurm-wlm and munge.
# DIR should be short: a socket's path holds 107 bytes.
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"

nodes=(node1 node2)
start_seconds=40

fail() {
    echo "slurm.sh: $*" >&2
    exit 1
}

# Processes that carry this cluster's mark in their environment: daemons, and whatever jobs have started. slurmstepd
# overwrites its environment by its title; it is known by its working directory, where the log of its slurmd is.
members() {
    local file
    { grep -lzxF "PISA_TEST_SLURM=$dir" /proc/[0-9]*/environ 2>/dev/null || true; } | tr -cd '0-9\n'
    { grep -lxF slurmstepd /proc/[0-9]*/comm 2>/dev/null || true; } | while read -r file; do
        [ "$(readlink "${file%comm}cwd")" != "$dir" ] || tr -cd '0-9\n' <<<"$file"
    done
}

stop() {
    local pids attempt
    if [ -e "$SLURM_CONF" ] && timeout 10 scontrol ping 2>/dev/null | grep -q "is UP"; then
        scancel --full --signal=KILL --user="$(id -un)" 2>/dev/null || true
        scancel --user="$(id -un)" 2>/dev/null || true
        for attempt in {1..100}; do
            [ -n "$(squeue --noheader 2>/dev/null)" ] || break
            sleep 0.1
        done
    fi
    for attempt in {1..50}; do
        pids="$(members)"
        [ -n "$pids" ] || break
        # Asked at first, then told.
        # shellcheck disable=SC2086  # a list of numbers
        if [ "$attempt" -lt 20 ]; then kill -TERM $pids 2>/dev/null || true; else kill -KILL $pids 2>/dev/null || true; fi
        sleep 0.2
    done
    if [ -e "$dir/watch.pid" ]; then kill "$(cat "$dir/watch.pid")" 2>/dev/null || true; fi
    [ -z "$(members)" ] || fail "these processes do not end: $(members | tr '\n' ' ')"
    rm -f "$dir"/*.pid "$dir"/munge/socket*
}

is_up() {
    [ -e "$dir/slurm.conf" ] && [ "$(sinfo --noheader --Node --states=idle,alloc,mix,comp --format=%N 2>/dev/null |
        sort -u | wc -l)" -eq "${#nodes[@]}" ]
}

free_ports() { # COUNT, below the ranges of launch/slurm.sbatch and of the kernel
    local port found=()
    while [ "${#found[@]}" -lt "$1" ]; do
        port=$((10000 + RANDOM % 5000))
        (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || found+=("$port")
    done
    echo "${found[@]}"
}

write_configuration() {
    local ports index
    read -r -a ports <<<"$(free_ports "$((1 + ${#nodes[@]}))")"
    # cred_expire is also the time that a requeued job waits, 120 s by default; sched_interval, 60 s, adds to it.
    cat >"$dir/slurm.conf" <<CONF
ClusterName=pisa
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/munge/socket,cred_expire=10
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
ReturnToService=2
KillWait=5
SlurmdTimeout=120
SlurmctldTimeout=120
MinJobAge=600
FirstJobId=$((1 + RANDOM % 10000))
SlurmdParameters=config_overrides
CONF
    for index in "${!nodes[@]}"; do
        echo "NodeName=${nodes[index]} NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=${ports[index + 1]} CPUs=4"
    done >>"$dir/slurm.conf"
    echo "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP" >>"$dir/slurm.conf"
}

launch() { # a daemon, free of this shell's session and output
    PISA_TEST_SLURM="$dir" setsid "$@" </dev/null >>"$dir/daemons.log" 2>&1 || fail "$1 does not start: $(tail -n 3 "$dir/daemons.log")"
}

start() {
    local attempt deadline node
    mkdir -p "$dir"/{munge,state,spool-node1,spool-node2}
    chmod 755 "$dir" "$dir/munge"
    if is_up; then return; fi
    for attempt in 1 2 3; do # again where a port was taken in the meantime
        stop
        rm -rf "$dir"/state/*
        write_configuration
        (umask 077 && head -c 128 /dev/urandom >"$dir/munge/key")
        launch munged --force --socket="$dir/munge/socket" --key-file="$dir/munge/key" --num-threads=2 \
            --pid-file="$dir/munge/munged.pid" --seed-file="$dir/munge/seed" --log-file="$dir/munge/munged.log"
        launch slurmctld -c
        for node in "${nodes[@]}"; do
            launch slurmd -N "$node"
        done
        deadline=$((SECONDS + start_seconds))
        while [ "$SECONDS" -lt "$deadline" ]; do
            if is_up; then return; fi
            sleep 0.2
        done
        echo "slurm.sh: attempt $attempt: no cluster after $start_seconds s" >&2
        tail -n 5 "$dir"/*.log >&2
    done
    stop
    fail "no cluster"
}

[ $# -ge 2 ] || fail "usage: slurm.sh start DIR [OWNER_PID] | stop DIR"
mkdir -p "$2"
dir="$(cd "$2" && pwd -P)"
export SLURM_CONF="$dir/slurm.conf"
case "$1" in
start)
    [ "$(id -u)" -eq 0 ] || fail "needs root"
    for program in munged slurmctld slurmd sbatch; do
        command -v "$program" >/dev/null || fail "needs slurm-wlm and munge: no $program"
    done
    start
    if [ -n "${3:-}" ]; then
        setsid "${BASH_SOURCE[0]}" watch "$dir" "$3" </dev/null >/dev/null 2>&1 &
        echo $! >"$dir/watch.pid"
    fi
    ;;
watch)
    while kill -0 "$3" 2>/dev/null; do sleep 1; done
    rm -f "$dir/watch.pid"
    stop
    ;;
stop) stop ;;
*) fail "unknown command $1" ;;
esac
