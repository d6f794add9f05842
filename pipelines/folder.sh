#!/usr/bin/env bash
# Your own images, one command a stage. DATA is a tree of images; its sub-folders are the classes, unless data.labels names a
# CSV of path,label. Images without a label are used too.
#
# Usage: pipelines/folder.sh DATA [--run DIR] [KEY=VALUE ...]     for example  pipelines/folder.sh photos data.labels=labels.csv
# Goes on from where it was; a stage that is done is skipped.
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "usage: $0 DATA [--run DIR] [KEY=VALUE ...]" >&2
    exit 2
fi

modicum=$(command -v modicum || echo .venv/bin/modicum)
data=$1
shift

"$modicum" pretrain folder data.root="$data" "$@"
"$modicum" finetune folder data.root="$data" "$@"
"$modicum" evaluate folder data.root="$data" "$@"
