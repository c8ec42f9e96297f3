#!/usr/bin/env bash
# Every table and figure of the paper: bash scripts/reproduce_all.sh [--smoke | --slurm FLAG...]; see paper.sh
# What trains nothing runs first; runs that tables share are made once; a failure does not stop the rest. With --smoke,
# everything runs on the demo, in minutes. Each script's head states models, data, protocol, Expected values, GPU-hours.
source "$(dirname "$0")/paper.sh" "$@"
for what in figure3_6 figure10_13 table3 table1 table7 table5 table6 table8 table2 figure7 figure8 figure9; do
    LATER=1 bash "scripts/$what.sh" "$@" || failed+=("scripts/$what.sh")
done
tables 1 2 3 5 6 7 8 fig1
bars
report
finish
