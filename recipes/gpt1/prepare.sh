#!/usr/bin/env bash
# Real texts for this recipe: snippets of movie reviews, product reviews, editorials and tweets with ratings from -4 to 4
# (Hutto and Gilbert, "VADER", ICWSM 2014; MIT), from the source package of vaderSentiment. Needs pip, tar and awk.
#
#   corpus.csv   texts without labels, to pre-train on; none of the test set is among them
#   train.csv    500 movie reviews with labels, half of them of either kind, to fine-tune on
#   test.csv     movie reviews with labels, at most 1000 of either kind
set -euo pipefail
cd "$(dirname "$0")"
mkdir -p data
package=data/vaderSentiment-3.3.2.tar.gz
[ -f "$package" ] || "${PYTHON:-python3}" -m pip download --quiet --no-deps --no-build-isolation --no-binary :all: \
    vaderSentiment==3.3.2 --dest data
echo "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9  $package" | sha256sum --check --quiet
tar --extract --gzip --to-stdout --file "$package" \
    vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz | tar --extract --gzip --directory data
from=data/hutto_ICWSM_2014

# ID, rating and text, separated by tabs. Every fourth review of those that are clearly one or the other is for the test.
quote='function quote(text) { gsub(/"/, "\"\"", text); return "\"" text "\"" }'
clear='function clear(rating) { return rating >= 0.5 || rating <= -0.5 }'
awk -F '\t' "$quote $clear"'
    BEGIN { print "text,label" > "data/test.csv"; print "text,label" > "data/train.csv"; print "text" > "data/corpus.csv" }
    {
        sub(/\r$/, "", $3)
        label = $2 > 0 ? "positive" : "negative"
        if (clear($2) && NR % 4 == 0 && tests[label]++ < 1000) { print quote($3) "," label > "data/test.csv"; next }
        if (clear($2) && NR % 4 == 1 && trains[label]++ < 250) { print quote($3) "," label > "data/train.csv" }
        print quote($3) > "data/corpus.csv"
    }' "$from/movieReviewSnippets_GroundTruth.txt"
for other in amazonReviewSnippets nytEditorialSnippets tweets; do
    awk -F '\t' "$quote"'{ sub(/\r$/, "", $3); print quote($3) }' "$from/${other}_GroundTruth.txt" >> data/corpus.csv
done
wc -l data/*.csv
