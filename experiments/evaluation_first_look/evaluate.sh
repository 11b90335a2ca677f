#!/bin/sh
# All eight protocols on three networks: evaluate.sh NAME CONTRASTIVE MIM HYBRID [settings of data]
# Interrupted, it goes on where it stopped. About half an hour on one core.
set -e
name=$1
networks="[$2,$3,$4]"
shift 4
out=outputs/evaluation_first_look/results/$name

run() {
    protocol=$1
    shift
    python evaluate.py "checkpoint=$networks" "names=[contrastive,mim,hybrid]" eval="$protocol" \
        run.root=outputs/evaluation_first_look run.dir="$out/$protocol" num_train=4000 num_val=1000 batch_size=100 "$@"
}

python experiments/evaluation_first_look/corrupt.py "$out/corrupted" $CORRUPT
run knn
run linear_probe
run linear_probe_grid eval.epochs=50 eval.batch_size=256
run linear_probe_mae eval.augment=null eval.batch_size=1024
run layer_probe
run shape_bias $MASKS
run frequency_noise
run robustness eval.root="$out/corrupted"
run segmentation_linear eval.epochs=6 $MASKS
run fine_tune eval.epochs=8 eval.warmup_epochs=1 eval.batch_size=128 eval.lr=1.0e-3 num_train=2000
