#!/bin/sh
# The sets of the comparison, of the same ten kinds; all but `few` are of seeds of their own: sh data.sh DATA
set -e
data=$1
here=$(dirname "$0")

objects() { # SET PICTURES [NUMBER_PER_KIND]
    [ -d "$data/objects/$1" ] || python "$here/cut.py" "$data/pictures/$2" "$data/objects/$1" $3
    [ -d "$data/$1" ] || python -m data_tools shard folder "$data/objects/$1" "$data/$1"
}

for spec in "probed 1000 101" "tune 1000 102" "test 2000 103" "unlabelled 12000 100"; do
    set -- $spec
    python -m data_tools synth "$data/pictures/$1" --images "$2" --seed "$3" --side 64-72
    objects "$1" "$1"
done
objects few probed 50 # 50 of each kind of those in `probed`
