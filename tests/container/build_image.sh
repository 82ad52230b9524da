#!/usr/bin/env bash
# Build the Dockerfile's CPU image with podman on a base that debootstrap makes, for machines that reach Debian's and
# Python's package registries but no image registry. Then run the image's default command, and print its size.
#
#   tests/container/build_cpu.sh WORK_FOLDER      as root; needs podman, buildah, crun, debootstrap and 30 GB
#
# pip and apt inside take this machine's configuration and certificates, which do not get into the image.
set -euo pipefail
work=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/../.."
base=localhost/flamingo-base image=localhost/flamingo-trainer:cpu
limits="${NICE:-10}"

if [ ! -e "$work/root/etc/debian_version" ]; then
    mirror=$(sed -n 's/^URIs: *//p; s/^deb \(http[^ ]*\) .*/\1/p' /etc/apt/sources.list.d/*.sources /etc/apt/sources.list 2>/dev/null |
        grep -v security | head -n 1)
    nice -n "$limits" debootstrap --variant=minbase --include=ca-certificates bookworm "$work/root" "$mirror"
fi
tar -C "$work/root" -c . | podman import - "$base" >/dev/null

mounts=(-v /etc/ssl/certs:/etc/ssl/certs:ro -v /etc/apt/apt.conf.d:/etc/apt/apt.conf.d:ro)
if [ -f /etc/pip.conf ]; then mounts+=(-v /etc/pip.conf:/etc/pip.conf:ro); fi
# Old versions of podman build the stages that are not used, too: these get the same base.
nice -n "$limits" podman build --isolation chroot --network host --pull=never --format docker "${mounts[@]}" \
    --build-arg DEVICE=cpu --build-arg CPU_IMAGE="$base" --build-arg CUDA_IMAGE="$base" \
    --build-arg CUDA_RUNTIME="$base" --tag "$image" .
podman image inspect --format '{{.Size}} bytes, user {{.Config.User}}, command {{.Config.Cmd}}' "$image"

container=$(buildah from --pull-never "$image")
trap 'buildah rm "$container" >/dev/null' EXIT
# chroot isolation, which needs no cgroups; buildah takes the user of the image, and no default command.
inside() { nice -n "$limits" buildah run --isolation chroot "$@"; }
inside "$container" -- id -un
inside "$container" -- tini -s -- python -m trainer.doctor
inside -v "$PWD/configs:/work/configs:ro" "$container" -- \
    python -m trainer.plan configs/flamingo-3b.yaml --nodes 1 --devices-per-node 8
inside "$container" -- bash -c '
    cd /tmp
    shared=/opt/flamingo/share/flamingo-trainer
    python $shared/launch_scripts/prepare_digits.py --output data/quickstart
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
    deepspeed --num_accelerators 2 --module trainer.pretrain_lm $shared/configs/quickstart/language_model.yaml \
        --training.steps 3 --schedule.warmup_steps 1
    ls runs/quickstart/language_model/export'
