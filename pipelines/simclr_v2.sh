#!/usr/bin/env bash
# The three steps of SimCLR v2, one command each: pretrains, fine-tunes on 40 labels, and distils the classifier into two students: one that
# starts from the same backbone, and the network STUDENT from random weights. `modicum run simclr_v2` does the same with the first alone.
#
# Usage: [RUNS=DIR] [STUDENT=NETWORK] pipelines/simclr_v2.sh [KEY=VALUE ...]     for example  RUNS=/data/runs pipelines/simclr_v2.sh seed=1
# The run folders are RUNS/simclr_v2-teacher, RUNS/simclr_v2-self and RUNS/simclr_v2-STUDENT; RUNS is runs/ unless set.
# Goes on from where it was; a stage that is done is skipped.
set -euo pipefail

modicum=$(command -v modicum || echo .venv/bin/modicum)
runs=${RUNS:-runs}
student=${STUDENT:-resnet10_tiny}
teacher=$runs/simclr_v2-teacher

tuned=(--run "$teacher" finetune.method=supervised)
"$modicum" pretrain simclr_v2 "${tuned[@]}" "$@"
"$modicum" finetune simclr_v2 "${tuned[@]}" "$@"
"$modicum" evaluate simclr_v2 "${tuned[@]}" "$@"

taught=(finetune.method.teacher_from="$teacher/finetune/classifier" 'finetune.baselines=[]')
same=(--run "$runs/simclr_v2-self" --init "$teacher/pretrain/backbone" "${taught[@]}")
"$modicum" finetune simclr_v2 "${same[@]}" "$@"
"$modicum" evaluate simclr_v2 "${same[@]}" "$@"

other=(--run "$runs/simclr_v2-$student" --init random backbone.name="$student" "${taught[@]}")
"$modicum" finetune simclr_v2 "${other[@]}" "$@"
"$modicum" evaluate simclr_v2 "${other[@]}" "$@"
