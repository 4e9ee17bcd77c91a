#!/usr/bin/env bash
# The experiments behind results/README.md:
#
#     DATA=/absolute/path/to/cifar10-jpeg bash results/reproduce.sh SECTION [--rehearse | --commands]
#
# DATA is CIFAR-10 as JPEG files: train/ and val/ with a folder per class (data/cifar10-jpeg here).
# A section prints what we expected before the run, trains, and ends with a table and a picture. Each
# continues where it stopped. Logs go to results/. --rehearse runs a few steps of everything on
# built-in images into runs/rehearsal; --commands only prints what would run. Sections, with the time
# on two CPU cores (AVX512-BF16) or one H100:
#
#     cpu          everything below that needs no GPU, in this order
#     rates        15 min   learning rates of the next section
#     five         55 min   five methods, same network, images and augmentation, 15 epochs
#     linear       12 min   linear evaluation of these, and of the untrained network
#     stop-grad     8 min   SimSiam without its stop-gradient
#     labels       20 min   1 % and 10 % of the labels; SimCLR v2: from layers 0 to 2, distillation
#     collapse     10 min   BYOL: what prevents collapse
#     stability     5 min   MoCo v3: frozen and learned patch projection
#     batch-sizes  25 min   InfoNCE, DCL and DCLW at batch 32 and 256
#     demo         25 min   the built-in images
#     gpu          20 min   the three below
#     gpu-dcl       8 min   DCL and InfoNCE, ResNet-18, batch 256
#     gpu-simsiam   7 min   SimSiam, ResNet-18
#     gpu-speed     5 min   loops, big networks and batch norm: tests/benchmark.py
set -euo pipefail
cd "$(dirname "$0")/.."
section=${1:?"a section: see the top of $0"}
mode=${2:-run}
DATA=${DATA:-data/cifar10-jpeg}
JOBS=${JOBS:-2}  # CPU runs at a time: two of one thread are faster than one of two threads
results=results runs=runs tiny=
if [ "$mode" = --rehearse ]; then
    results=runs/rehearsal/results runs=runs/rehearsal
    tiny="--data demo --steps 2 --workers 0 --batch-size 16 --device cpu"
fi

# Reads lines "NAME SCRIPT FLAGS..." and runs each in $runs/NAME, $1 at a time. Copies its log to
# $results/NAME.jsonl.
sweep() {
    if [ "$mode" = --commands ]; then
        sed -E 's|^([^ ]+) (.*)|python \2 --out runs/\1|'
        return
    fi
    runs=$runs results=$results tiny=$tiny xargs -P "$1" -L 1 bash -c '
        mkdir -p "$runs/${0%/*}" "$results/${0%/*}"
        python "$@" $tiny --out "$runs/$0" >> "$runs/$0.txt" 2>&1 ||
            { echo "$0 failed:"; tail -n 3 "$runs/$0.txt"; exit 255; }
        cp "$runs/$0/log.jsonl" "$results/$0.jsonl"
        echo "$0: $(tail -n 1 "$runs/$0.txt")"'
}

on_cpu() { OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} sweep "$JOBS"; }

# The table and the picture of a section's logs: FOLDER [--show QUANTITY...], for both.
report() {
    [ "$mode" = --commands ] && return
    folder=$1 && shift
    python results/table.py "$results/$folder"/*.jsonl "$@"
    python results/figures.py "$results/$folder"/*.jsonl "$@" --out "$results/$folder/curves.png" ||
        echo "No picture: pip install matplotlib."
}

expect() { if [ "$mode" != --commands ]; then printf '\n%s: %s\n' "$section" "$*"; fi; }

# ---------------------------------------------------------------------------- five methods, two cores

# The same network, crops and colors for all. ResNet-10 and crops of 24 px: 1,800 images/s.
same="--data $DATA --arch resnet10 --width 0.25 --no-zero-init-residual --image-size 24"
same+=" --mean 0.4914 0.4822 0.4465 --std 0.2470 0.2435 0.2616 --crop-min 0.2"
same+=" --jitter 0.4 0.4 0.4 0.1 --jitter-prob 0.8 --gray-prob 0.2"
same+=" --batch-size 128 --workers 0 --log-every 130"
# Learning rates: the best of the section `rates` without --output-bn, which BYOL does not have; for
# MoCo v3 its recipe's, 0.2 points behind twice that rate.
simsiam="simsiam.py --recipe cifar $same --blur-prob 0 --hidden-dim 512 --dim 512"
simsiam+=" --predictor-dim 128 --base-lr 0.24"
byol="byol.py --recipe cifar $same --blur-prob 0 0 --solarize-prob 0 0 --hidden-dim 1024"
byol+=" --warmup-epochs 0.5 --base-tau 0.98 --base-lr 8"
moco="moco_v3.py --recipe cifar-resnet $same --blur-prob 0 0 --solarize-prob 0 0 --hidden-dim 512"
moco+=" --knn-every-steps 0 --warmup-epochs 0.5 --base-lr 6"
dcl="dcl.py --recipe cifar $same --blur-prob 0 --base-lr 0.12"
simclr="simclr_v2.py --recipe cifar $same --blur-prob 0 --temperature 0.1 --warmup-epochs 0.5"
simclr+=" --weight-decay 1e-6 --base-lr 4"

rates() {
    expect "the best kNN after two epochs decides; chosen on the validation images, with one seed."
    on_cpu <<END
rates/simsiam-0.06 $simsiam --epochs 2 --knn-every 2 --base-lr 0.06
rates/simsiam-0.24 $simsiam --epochs 2 --knn-every 2 --base-lr 0.24
rates/simsiam-0.96 $simsiam --epochs 2 --knn-every 2 --base-lr 0.96
rates/byol-2 $byol --epochs 2 --knn-every 2 --base-lr 2
rates/byol-2-bn $byol --epochs 2 --knn-every 2 --base-lr 2 --output-bn
rates/byol-8 $byol --epochs 2 --knn-every 2 --base-lr 8
rates/moco_v3-6 $moco --epochs 2 --knn-every 2 --base-lr 6
rates/moco_v3-12 $moco --epochs 2 --knn-every 2 --base-lr 12
rates/dcl-0.12 $dcl --epochs 2 --knn-every 2 --base-lr 0.12
rates/dcl-0.48 $dcl --epochs 2 --knn-every 2 --base-lr 0.48
rates/simclr_v2-1 $simclr --epochs 2 --knn-every 2 --base-lr 1
rates/simclr_v2-4 $simclr --epochs 2 --knn-every 2 --base-lr 4
END
    report rates
}

five() {
    expect "15 epochs favor losses with negatives, as 30 epochs of ResNet-18 on a GPU did: MoCo v3" \
        "first, SimCLR and DCL within 5 points of it, BYOL and SimSiam 5 to 20 points behind. All" \
        "more than 10 points above the untrained network, which is the same for all (same seed)."
    on_cpu <<END
five/byol $byol --epochs 15 --knn-every 3
five/moco_v3 $moco --epochs 15 --knn-every 3
five/simsiam $simsiam --epochs 15 --knn-every 3
five/dcl $dcl --epochs 15 --knn-every 3
five/simclr_v2 $simclr --epochs 15 --knn-every 3
END
    report five --show loss knn std rank
}

linear() {
    expect "5 to 10 points above kNN, in the same order; the untrained network far below. The best of" \
        "three learning rates counts: features differ in scale."
    set -- --workers 0 --log-every 195 --epochs 10 --batch-size 256 --crop-min 1 --data "$DATA"
    untrained="--arch resnet10 --width 0.25 --no-zero-init-residual --image-size 24"
    for lr in 3 0.3 0.03; do
        cat <<END
linear/untrained-$lr simsiam.py linear $* --recipe cifar --base-lr $lr --init none $untrained
linear/simsiam-$lr simsiam.py linear $* --recipe cifar --base-lr $lr --init $runs/five/simsiam/last.pt
linear/byol-$lr byol.py linear $* --recipe cifar --base-lr $lr --init $runs/five/byol/last.pt
linear/moco_v3-$lr moco_v3.py linear $* --recipe cifar-resnet --base-lr $lr --init $runs/five/moco_v3/last.pt
linear/dcl-$lr dcl.py linear $* --recipe cifar --base-lr $lr --init $runs/five/dcl/last.pt
linear/simclr_v2-$lr simclr_v2.py linear $* --recipe cifar --base-lr $lr --init $runs/five/simclr_v2/last.pt
END
    done | on_cpu
    report linear --show top1 loss
}

# ------------------------------------------------------------------------------ the papers' findings

stop_grad() {
    expect "(SimSiam, Fig. 2) without the stop-gradient the loss falls towards -1, std towards 0, and" \
        "kNN stays near the untrained network's; with it std stays near 1. Every seed."
    for seed in 0 1 2; do
        echo "stop-grad/with-seed$seed $simsiam --epochs 2 --seed $seed"
        echo "stop-grad/without-seed$seed $simsiam --epochs 2 --seed $seed --no-stop-grad"
    done | on_cpu
    report stop-grad --show loss knn std rank
}

labels() {
    expect "(SimCLR v2, Sec. 3) pre-training beats training from scratch by 5 points or more with 1 %" \
        "of the labels, by less with 10 %. With 1 %, layer 1 of the head is the best to start from; with" \
        "10 % the layers differ less. A student of the same size, without labels, reaches its teacher."
    set -- finetune --data "$DATA" --recipe cifar --workers 0 --knn-every 0
    scratch="--init none --from-layer 0 --arch resnet10 --width 0.25 --no-zero-init-residual"
    scratch+=" --image-size 24 --mean 0.4914 0.4822 0.4465 --std 0.2470 0.2435 0.2616"
    # lr 0.1: the recipe's. It is too high for this encoder; 0.01 is the best of 0.1, 0.01 and 0.001
    # for layer 1, seed 0.
    for seed in 0 1 2; do
        echo "labels/0.01-scratch-seed$seed simclr_v2.py $* --labels 0.01 --seed $seed $scratch"
        for lr in 0.1 0.01; do
            for layer in 0 1 2; do
                echo "labels/0.01-layer-$layer-lr-$lr-seed$seed simclr_v2.py $* --labels 0.01 --seed $seed" \
                    "--init $runs/five/simclr_v2/last.pt --from-layer $layer --base-lr $lr"
            done
        done
    done | on_cpu
    {
        echo "labels/0.1-scratch-seed0 simclr_v2.py $* --labels 0.1 --epochs 15 $scratch"
        for layer in 0 1 2; do
            echo "labels/0.1-layer-$layer-lr-0.01-seed0 simclr_v2.py $* --labels 0.1 --epochs 15" \
                "--init $runs/five/simclr_v2/last.pt --from-layer $layer --base-lr 0.01"
        done
    } | on_cpu
    for seed in 0 1 2; do  # BYOL's recipe, 1 % of the labels
        set -- byol.py finetune --data "$DATA" --recipe cifar --workers 0 --knn-every 0 --labels 0.01
        echo "labels/byol-0.01-scratch-seed$seed $* --seed $seed ${scratch/--from-layer 0 /}"
        echo "labels/byol-0.01-seed$seed $* --seed $seed --init $runs/five/byol/last.pt"
    done | on_cpu
    on_cpu <<END
labels/0.1-student simclr_v2.py distill --data $DATA --recipe cifar --workers 0 --teacher $runs/labels/0.1-layer-1-lr-0.01-seed0/last.pt --epochs 8 --batch-size 128 --base-lr 4 --warmup-epochs 0.5 --knn-every 4
END
    report labels
}

collapse() {
    expect "(BYOL, Tables 5, 19, 21) no predictor, and tau 0: collapse (rank near 1). A fixed random" \
        "target (tau 1): far below BYOL, above untrained. tau 0 with a predictor 10 times faster," \
        "negatives without predictor and target: as good as BYOL."
    set -- byol.py --width 0.125 --epochs 8 --log-every 25 --workers 0
    for seed in 0 1 2; do
        cat <<END
collapse/byol-seed$seed $* --seed $seed
collapse/no-predictor-seed$seed $* --seed $seed --predictor none
collapse/tau-0-seed$seed $* --seed $seed --base-tau 0 --tau-schedule constant
collapse/tau-0-fast-predictor-seed$seed $* --seed $seed --base-tau 0 --tau-schedule constant --predictor-lr-mult 10
collapse/tau-1-seed$seed $* --seed $seed --base-tau 1
collapse/negatives-seed$seed $* --seed $seed --predictor none --target online --beta 1
collapse/no-output-bn-seed$seed $* --seed $seed --no-output-bn
END
    done | on_cpu
    report collapse --show loss knn std rank
}

stability() {
    expect "(MoCo v3, Sec. 4.2) with the learned projection gradients spike, at the first layer first," \
        "and kNN dips; more so at the higher learning rate. The frozen one is more stable, and ahead."
    for seed in 0 1 2; do
        for lr in 0.01 0.03; do
            for projection in learned frozen; do
                echo "stability/$projection-$lr-seed$seed moco_v3.py --patch-projection $projection" \
                    "--base-lr $lr --seed $seed --knn-every 3 --knn-every-steps 10 --log-every 5 --workers 0"
            done
        done
    done | on_cpu
    report stability --show knn_queue grad_first grad_last
}

batch_sizes() {
    expect "(DCL, Sec. 4) DCL is ahead of InfoNCE at batch 32 (paper, 200 epochs: 4.8 points), less at" \
        "256 (2.8). q_mean is lower and q_cv higher at 32 than at 256. DCLW is near DCL."
    for seed in 0 1 2; do
        for batch in 32 256; do
            for loss in infonce dcl dclw; do
                echo "batch-sizes/$loss-$batch-seed$seed $dcl --epochs 2 --knn-every 2" \
                    "--log-every 195 --batch-size $batch --loss $loss --seed $seed"
            done
        done
    done | on_cpu
    report batch-sizes --show knn q_mean q_cv
}

demo() {  # the table in README. One run at a time, with every core; the same on any x86 machine
    export ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
    expect "kNN after training is more than 25 points above the untrained network's, for every method."
    for script in simsiam byol moco_v3 dcl simclr_v2; do
        for seed in 0 1 2; do
            echo "demo/$script-seed$seed $script.py --precision fp32 --seed $seed"
            echo "demo/$script-linear-seed$seed $script.py linear --precision fp32 --seed $seed" \
                "--init $runs/demo/$script-seed$seed/last.pt"
        done
        echo "demo/$script-linear-untrained-seed0 $script.py linear --data demo --init none --precision fp32"
    done | sweep 1
    report demo
}

# ------------------------------------------------------------------------------------------- one GPU

gpu_dcl() {
    expect "DCL is ahead of InfoNCE at batch 256 (paper, 200 epochs: 84.2 and 81.4 % kNN; 30 epochs on" \
        "an H200: 66.0 and 65.0 %)."
    sweep 1 <<END
gpu-dcl/dcl dcl.py --data $DATA --recipe cifar --epochs 50 --knn-every 10 --loss dcl
gpu-dcl/infonce dcl.py --data $DATA --recipe cifar --epochs 50 --knn-every 10 --loss infonce
END
    report gpu-dcl --show loss knn q_mean q_cv
}

gpu_simsiam() {
    expect "above 48.1 % kNN, which 50 epochs gave on an H200. The paper's 91.8 % (linear) needs 800."
    sweep 1 <<END
gpu-simsiam/simsiam simsiam.py --data $DATA --recipe cifar --epochs 100 --knn-every 10
gpu-simsiam/linear simsiam.py linear --data $DATA --recipe cifar --init $runs/gpu-simsiam/simsiam/last.pt --epochs 20
END
    report gpu-simsiam --show loss knn std rank
}

gpu_speed() {
    expect "loops at least 0.9 of their bare steps; batch norm as torch's, up to bfloat16's rounding."
    set -- python tests/benchmark.py --only loop big sync_bn --width 1
    case $mode in
        --commands) echo "$@ --devices cuda" ;;
        --rehearse) "$@" --quick ;;
        *) "$@" --devices cuda | tee results/benchmark-gpu.txt ;;
    esac
}

gpu() {
    for section in gpu-dcl gpu-simsiam gpu-speed; do
        "${section//-/_}"
    done
}

cpu() {
    for section in rates five linear stop-grad labels collapse stability batch-sizes demo; do
        "${section//-/_}"
    done
}

"${section//-/_}"
