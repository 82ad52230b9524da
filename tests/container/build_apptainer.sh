#!/usr/bin/env bash
# Build launch_scripts/apptainer.def with Debian's apptainer, on a base that debootstrap makes instead of NVIDIA's image.
# Then run the image's test, its doctor and a few training steps on the CPU, and print the size of the image.
#
#   tests/container/build_apptainer.sh WORK_FOLDER   as root; needs debootstrap and 25 GB
#   TORCH_CUDA_ARCH_LIST=9.0a                        cards of the CUDA kernels (default: those of setup.py)
#
# Only Debian unstable has apptainer, so it runs in a root of its own. pip and apt inside take this machine's
# configuration and certificates, which do not get into the image.
set -euo pipefail
work=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/../.."
source tests/container/base.sh
debian_root sid "$work/sid" ca-certificates,apptainer
debian_root trixie "$work/trixie" ca-certificates
add_cuda "$work/trixie" "$work/cuda-packages"

mkdir -p "$work/scratch"
# The steps are those of the file; only its base is another.
sed -e 's|^Bootstrap: .*|Bootstrap: localimage|' -e 's|^From: .*|From: /base|' launch_scripts/apptainer.def >"$work/scratch/image.def"

# apptainer moves its mounts about, so its root must be the root of a namespace of mounts, not that of chroot.
inside() {
    nice -n "${NICE:-10}" unshare --mount --propagation private tests/container/in_root.sh \
        "$work/sid" "$PWD:/clone" "$work/trixie:/base" "$work/scratch:/scratch" -- "$@"
}
binds=/etc/ssl/certs,/etc/apt/apt.conf.d
settings="MAX_JOBS=1 ${TORCH_CUDA_ARCH_LIST:+TORCH_CUDA_ARCH_LIST='$TORCH_CUDA_ARCH_LIST'}"
if [ -f /etc/pip.conf ]; then
    mkdir -p "$work/scratch/pip"
    cp /etc/pip.conf "$work/scratch/pip"
    binds+=,/scratch/pip:/mnt
    settings+=" PIP_CONFIG_FILE=/mnt/pip.conf"
fi
# apptainer asks for all rights of root, and a virtual machine may lack this one.
rights="export APPTAINER_DROP_CAPS=CAP_SYS_RESOURCE"
inside bash -euc "
    $rights TMPDIR=/scratch APPTAINER_CACHEDIR=/scratch/cache
    for setting in $settings; do export \"APPTAINERENV_\$setting\"; done
    cd /clone
    apptainer build --force --bind $binds /scratch/flamingo-trainer.sif /scratch/image.def"
stat --format '%s bytes' "$work/scratch/flamingo-trainer.sif"
inside bash -euc "$rights"'
    cd /tmp
    image=/scratch/flamingo-trainer.sif
    apptainer test $image
    apptainer run --env DS_ACCELERATOR=cpu $image
    apptainer exec --bind /clone:/clone --env SHARED=/clone $image bash /clone/tests/container/train_inside.sh'
