#!/bin/sh
# DCL's study of batch sizes at a scale that two CPU cores can do in two hours (a GPU in minutes): the
# losses, batch sizes and seeds; before it three learning rates; after it one checkpoint of each loss,
# whose weights stay (lr 1e-30), asked for q_B at many batch sizes. Every run goes on where it was
# stopped and does nothing once it is finished. From the repository's folder:
#
#     DATA=/path/to/cifar10-10k sh results/dcl_study.sh
#
# DATA holds train/ and val/ with a folder a class; here: CIFAR-10 as JPEG, the first 1,000 images by
# name of each class in train/, all of val/. results/figures.py draws the logs.
set -e
run="python dcl.py --data ${DATA:?the folder of the images} --recipe cifar --width 0.25"
train="$run --epochs 8 --knn-every 8"
ask="$run --knn-every 0 --epochs 1 --base-lr 1e-30 --log-every 100000"

# The learning rate, of batch 64: 0.12 (which the study then takes) is the best of these for both.
$train --loss infonce --batch-size 64 --base-lr 0.03 --out runs/dcl-study/lr-0.03-infonce-64-0
$train --loss dcl --batch-size 64 --base-lr 0.03 --out runs/dcl-study/lr-0.03-dcl-64-0
$train --loss infonce --batch-size 64 --base-lr 0.5 --out runs/dcl-study/lr-0.5-infonce-64-0
$train --loss dcl --batch-size 64 --base-lr 0.5 --out runs/dcl-study/lr-0.5-dcl-64-0

# The study: losses x batch sizes x seeds, lr 0.12 * batch / 256, the same epochs.
$train --loss infonce --batch-size 16 --base-lr 0.12 --seed 0 --out runs/dcl-study/infonce-16-0
$train --loss dcl --batch-size 16 --base-lr 0.12 --seed 0 --out runs/dcl-study/dcl-16-0
$train --loss infonce --batch-size 16 --base-lr 0.12 --seed 1 --out runs/dcl-study/infonce-16-1
$train --loss dcl --batch-size 16 --base-lr 0.12 --seed 1 --out runs/dcl-study/dcl-16-1
$train --loss infonce --batch-size 16 --base-lr 0.12 --seed 2 --out runs/dcl-study/infonce-16-2
$train --loss dcl --batch-size 16 --base-lr 0.12 --seed 2 --out runs/dcl-study/dcl-16-2
$train --loss infonce --batch-size 64 --base-lr 0.12 --seed 0 --out runs/dcl-study/infonce-64-0
$train --loss dcl --batch-size 64 --base-lr 0.12 --seed 0 --out runs/dcl-study/dcl-64-0
$train --loss dclw --batch-size 64 --base-lr 0.12 --seed 0 --out runs/dcl-study/dclw-64-0
$train --loss infonce --batch-size 64 --base-lr 0.12 --seed 1 --out runs/dcl-study/infonce-64-1
$train --loss dcl --batch-size 64 --base-lr 0.12 --seed 1 --out runs/dcl-study/dcl-64-1
$train --loss dclw --batch-size 64 --base-lr 0.12 --seed 1 --out runs/dcl-study/dclw-64-1
$train --loss infonce --batch-size 64 --base-lr 0.12 --seed 2 --out runs/dcl-study/infonce-64-2
$train --loss dcl --batch-size 64 --base-lr 0.12 --seed 2 --out runs/dcl-study/dcl-64-2
$train --loss dclw --batch-size 64 --base-lr 0.12 --seed 2 --out runs/dcl-study/dclw-64-2
$train --loss infonce --batch-size 256 --base-lr 0.12 --seed 0 --out runs/dcl-study/infonce-256-0
$train --loss dcl --batch-size 256 --base-lr 0.12 --seed 0 --out runs/dcl-study/dcl-256-0
$train --loss infonce --batch-size 256 --base-lr 0.12 --seed 1 --out runs/dcl-study/infonce-256-1
$train --loss dcl --batch-size 256 --base-lr 0.12 --seed 1 --out runs/dcl-study/dcl-256-1
$train --loss infonce --batch-size 256 --base-lr 0.12 --seed 2 --out runs/dcl-study/infonce-256-2
$train --loss dcl --batch-size 256 --base-lr 0.12 --seed 2 --out runs/dcl-study/dcl-256-2

# The control: 4096 images, in batches of 16 to 1024, through what batch 64 has trained.
$ask --loss infonce --batch-size 16 --steps 256 --init runs/dcl-study/infonce-64-0/last.pt --out runs/dcl-study/ask-infonce-16
$ask --loss infonce --batch-size 32 --steps 128 --init runs/dcl-study/infonce-64-0/last.pt --out runs/dcl-study/ask-infonce-32
$ask --loss infonce --batch-size 64 --steps 64 --init runs/dcl-study/infonce-64-0/last.pt --out runs/dcl-study/ask-infonce-64
$ask --loss infonce --batch-size 128 --steps 32 --init runs/dcl-study/infonce-64-0/last.pt --out runs/dcl-study/ask-infonce-128
$ask --loss infonce --batch-size 256 --steps 16 --init runs/dcl-study/infonce-64-0/last.pt --out runs/dcl-study/ask-infonce-256
$ask --loss infonce --batch-size 512 --steps 8 --init runs/dcl-study/infonce-64-0/last.pt --out runs/dcl-study/ask-infonce-512
$ask --loss infonce --batch-size 1024 --steps 4 --init runs/dcl-study/infonce-64-0/last.pt --out runs/dcl-study/ask-infonce-1024
$ask --loss dcl --batch-size 16 --steps 256 --init runs/dcl-study/dcl-64-0/last.pt --out runs/dcl-study/ask-dcl-16
$ask --loss dcl --batch-size 32 --steps 128 --init runs/dcl-study/dcl-64-0/last.pt --out runs/dcl-study/ask-dcl-32
$ask --loss dcl --batch-size 64 --steps 64 --init runs/dcl-study/dcl-64-0/last.pt --out runs/dcl-study/ask-dcl-64
$ask --loss dcl --batch-size 128 --steps 32 --init runs/dcl-study/dcl-64-0/last.pt --out runs/dcl-study/ask-dcl-128
$ask --loss dcl --batch-size 256 --steps 16 --init runs/dcl-study/dcl-64-0/last.pt --out runs/dcl-study/ask-dcl-256
$ask --loss dcl --batch-size 512 --steps 8 --init runs/dcl-study/dcl-64-0/last.pt --out runs/dcl-study/ask-dcl-512
$ask --loss dcl --batch-size 1024 --steps 4 --init runs/dcl-study/dcl-64-0/last.pt --out runs/dcl-study/ask-dcl-1024
