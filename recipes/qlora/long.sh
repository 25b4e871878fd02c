#!/usr/bin/env bash
# Conversations of more than 512 tokens each, to measure what one of them takes in memory. Needs awk.
#
#   ./long.sh
#   oxiformers train --dry-run recipe.toml --data.train data/long.jsonl --gradient-accumulation-steps 1
set -euo pipefail
cd "$(dirname "$0")"
mkdir -p data
awk 'BEGIN {
    for (n = 2; n <= 17; n++) {
        printf "{\"messages\": [{\"role\": \"user\", \"content\": \"Write the multiplication table of %d.\"}, ", n
        printf "{\"role\": \"assistant\", \"content\": \""
        for (i = 1; i <= 80; i++) printf "%s%d times %d is %d.", (i > 1 ? " " : ""), i, n, i * n
        print "\"}]}"
    }
}' > data/long.jsonl
wc data/long.jsonl
