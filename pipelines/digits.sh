#!/usr/bin/env bash
# The chain of `modicum run digits`, one command a stage: scikit-learn's digits, 40 labels, a few minutes on a laptop.
#
# Usage: pipelines/digits.sh [--run DIR] [KEY=VALUE ...]     for example  pipelines/digits.sh --run runs/other seed=1
# Goes on from where it was; a stage that is done is skipped.
set -euo pipefail

modicum=$(command -v modicum || echo .venv/bin/modicum)

"$modicum" pretrain digits "$@"
"$modicum" finetune digits "$@"
"$modicum" evaluate digits "$@"
