#!/usr/bin/env bash
# Fashion-MNIST at four label counts: pretrains once, then fine-tunes and evaluates from that backbone in a run folder each.
#
# Usage: [RUNS=DIR] pipelines/fashion_mnist.sh [KEY=VALUE ...]     for example  RUNS=/data/runs pipelines/fashion_mnist.sh seed=1
# The run folders are RUNS/fashion_mnist and RUNS/fashion_mnist-<labels>; RUNS is runs/ unless set.
# The images come with `apt-get install dataset-fashion-mnist`, or are downloaded.
# Goes on from where it was; a stage that is done is skipped.
set -euo pipefail

modicum=$(command -v modicum || echo .venv/bin/modicum)
runs=${RUNS:-runs}

"$modicum" pretrain fashion_mnist --run "$runs/fashion_mnist" "$@"
"$modicum" evaluate fashion_mnist --run "$runs/fashion_mnist" "$@" # the backbone; the runs below take its features from there

for labels in 40 100 250 1000; do
    start=(--run "$runs/fashion_mnist-$labels" --init "$runs/fashion_mnist/pretrain/backbone" finetune.labels="$labels")
    if ((labels > 100)); then # the more labels, the more there is to learn from them
        start+=(finetune.steps=$((labels > 250 ? 2000 : 600)) finetune.backbone_lr_scale=1)
    fi
    "$modicum" finetune fashion_mnist "${start[@]}" "$@"
    "$modicum" evaluate fashion_mnist "${start[@]}" "$@"
done
