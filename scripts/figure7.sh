#!/usr/bin/env bash
# Figure 7, divergences between the rules of Table 6: bash scripts/figure7.sh [--smoke | --slurm FLAG...]; see paper.sh
# Models and data as in Table 6; mean KL(row || column) over the 50,000 validation images.
# Expected: the paper gives no numbers beside its picture; the diagonal is zero.
source "$(dirname "$0")/paper.sh" "$@"
aggregate mae
publish "$out/aggregation/mae/kl.pdf" figure7.pdf
