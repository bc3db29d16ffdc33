#!/usr/bin/env bash
# PISA next to synchronous AdamW and FedAvg on the worst split there is: ten workers with one digit each, on two
# processes; first with everyone present, then with three workers of ten in each round. A table and pictures at the end.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
prepare_environment ""

out="${1:-runs/quickstart-$(date +%Y%m%d-%H%M%S)}"
train() { # NAME EXPERIMENT PARTICIPATION
    echo
    echo "--- $1"
    torchrun --standalone --nproc-per-node 2 -m pisa_dist.train \
        experiment="$2" participation="$3" run_dir="$out/$1" eval_every=20
}
started=$SECONDS
for everyone in "everyone 1.0" "three_of_ten 0.3"; do
    read -r folder participation <<<"$everyone"
    train "$folder/pisa" digits_label1 "$participation"
    train "$folder/adamw" digits_label1_adamw "$participation"
    train "$folder/fedavg" digits_label1_fedavg "$participation"
done
for folder in everyone three_of_ten; do
    echo
    echo "--- $folder"
    python -m pisa_dist.report "$out/$folder" --output "$out/$folder/figures"
done
echo
echo "trained and drawn in $((SECONDS - started)) s; open $out/everyone/figures/accuracy.png"
