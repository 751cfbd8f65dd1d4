#!/bin/sh
# The four sets of the comparison, of the same ten classes and from different seeds: sh data.sh DATA
set -e
data=$1
for spec in "unlabelled 4000 100" "few 200 101" "tune 400 102" "test 1000 103"; do
    set -- $spec
    python -m data_tools synth "$data/pictures/$1" --images "$2" --seed "$3" --side 80-96
    python -m data_tools shard folder "$data/pictures/$1/images" "$data/$1"
done
