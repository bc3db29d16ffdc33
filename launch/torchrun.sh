#!/usr/bin/env bash
# Train under torchrun: one machine, several machines, or a number of machines that changes.
#
#   launch/torchrun.sh experiment=digits_label1                                    all GPUs of this machine, or 1 process
#   NPROC_PER_NODE=2 launch/torchrun.sh KEY=VALUE...                               2 processes
#   NNODES=2 RDZV_ENDPOINT=first:29400 launch/torchrun.sh KEY=VALUE...             the same command on both machines
#   NNODES=1:4 MAX_RESTARTS=10 RDZV_ENDPOINT=first:29400 launch/torchrun.sh run_dir=DIR KEY=VALUE...
#                                                                                  elastic: 1 to 4 machines
#
# Arguments go on to pisa_dist.train. To stop in good order send TERM to torchrun, the process that this script becomes.
# docs/clusters.md explains elastic runs.
set -euo pipefail

PYTHON="${PYTHON:-python}"
NNODES="${NNODES:-1}"                     # number of machines, or MIN:MAX
NPROC_PER_NODE="${NPROC_PER_NODE:-}"      # processes on this machine; empty: one per GPU, or 1
RDZV_ENDPOINT="${RDZV_ENDPOINT:-}"        # HOST:PORT on a machine that stays; needed with several
RDZV_ID="${RDZV_ID:-pisa}"                # tells runs apart that share an endpoint
LAST_CALL_SECONDS="${LAST_CALL_SECONDS:-30}" # elastic: how long those that are there wait for more
LOCAL_ADDR="${LOCAL_ADDR:-}"              # address of this machine where its name does not resolve for the others
MAX_RESTARTS="${MAX_RESTARTS:-0}"         # times that the processes are started again after one has failed
CHECKPOINT_EVERY="${CHECKPOINT_EVERY:-50}" # rounds, where there are restarts; a restart loses at most as many

fail() {
    echo "torchrun.sh: $*" >&2
    exit 2
}

if [ -z "$NPROC_PER_NODE" ]; then
    NPROC_PER_NODE="$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)"
    if [ "$NPROC_PER_NODE" -eq 0 ]; then NPROC_PER_NODE=1; fi
fi
# The processes of a machine share its cores; more threads than cores make them wait for one another.
if [ -z "${OMP_NUM_THREADS:-}" ]; then
    OMP_NUM_THREADS="$(($(nproc) / NPROC_PER_NODE))"
    if [ "$OMP_NUM_THREADS" -eq 0 ]; then OMP_NUM_THREADS=1; fi
fi
export OMP_NUM_THREADS

options=(--nnodes "$NNODES" --nproc-per-node "$NPROC_PER_NODE" --max-restarts "$MAX_RESTARTS")
if [ -n "$RDZV_ENDPOINT" ]; then
    options+=(--rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "$RDZV_ID")
    options+=(--rdzv-conf "last_call_timeout=$LAST_CALL_SECONDS")
elif [ "$NNODES" = 1 ]; then
    options+=(--standalone)
else
    fail "RDZV_ENDPOINT=HOST:PORT is needed with NNODES=$NNODES, the same on every machine"
fi
if [ -n "$LOCAL_ADDR" ]; then options+=(--local-addr "$LOCAL_ADDR"); fi

resume=()
if [ "$MAX_RESTARTS" -gt 0 ]; then
    if [[ " $* " != *" run_dir="* ]]; then fail "run_dir=DIR is needed with MAX_RESTARTS: restarts go on from there"; fi
    resume=(resume=auto checkpoint.every="$CHECKPOINT_EVERY")
fi

# A machine that joins a running job asks for an address that torch (seen in 2.13) publishes only at the first rendezvous
# when agents share one store; all would wait a minute for it and give up.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"

# torchrun handles TERM and passes it on; USR1 would end it and leave its processes behind.
trap '' USR1
exec "$PYTHON" -m torch.distributed.run "${options[@]}" -m pisa_dist.train "${resume[@]}" "$@"
