#!/usr/bin/env bash
# Fills the corpus of each target with the fixtures of the tests, whole and broken ones. May be run again.
set -euo pipefail
cd "$(dirname "$0")"

# seed TARGET NAME...: every fixture whose name is one of the patterns.
seed() {
    local target="$1" pattern file
    shift
    mkdir -p "corpus/$target"
    for pattern in "$@"; do
        find ../crates/*/tests -type f -path '*/fixtures/*' -name "$pattern" -size -200k | while read -r file; do
            # Equal names of different crates both stay.
            cp "$file" "corpus/$target/$(cksum <"$file" | tr ' ' '-')"
        done
    done
    printf '%-16s%s\n' "$target" "$(find "corpus/$target" -type f | wc -l)"
}

seed safetensors '*.safetensors'
seed gguf '*.gguf'
seed torch '*.bin' '*.pt' '*.pth' '*.ckpt'
seed tokenizer_json 'tokenizer*.json'
seed sentencepiece '*.model'
seed tiktoken '*.tiktoken' 'tiktoken*.model' 'tekken*.json'
seed chat_template '*.jinja'
seed hub_metadata '*.index.json' '*.html'
