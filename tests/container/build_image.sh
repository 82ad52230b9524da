#!/usr/bin/env bash
# Build the Dockerfile's CPU or CUDA image with podman on bases that debootstrap makes, for machines that reach Debian's
# and Python's package registries but no image registry. Then run the image on the CPU, and print its size.
#
#   tests/container/build_image.sh cpu|cuda WORK_FOLDER   as root; needs podman, buildah, crun, debootstrap and 30 GB
#   TORCH_CUDA_ARCH_LIST=9.0a                             cards of the CUDA kernels (default: the Dockerfile's)
#
# The CUDA image gets a base with nvcc to build on, and one without any CUDA to run on. pip and apt inside take this
# machine's configuration and certificates, which do not get into the image.
set -euo pipefail
device=$1
work=$(mkdir -p "$2" && cd "$2" && pwd)
cd "$(dirname "$0")/../.."
source tests/container/base.sh
base=localhost/flamingo-base:$device toolkit=localhost/flamingo-base:toolkit image=localhost/flamingo-trainer:$device
low() { nice -n "${NICE:-10}" "$@"; }

# Once, because another base has no cached steps: import_once IMAGE ARGUMENTS_OF_TAR
import_once() {
    if ! podman image exists "$1"; then tar -c "${@:2}" | podman import - "$1" >/dev/null; fi
}

arguments=()
case "$device" in
    cpu)
        debian_root bookworm "$work/bookworm" ca-certificates
        import_once "$base" -C "$work/bookworm" .
        toolkit=$base
        ;;
    cuda) # as new as the Ubuntu of the Dockerfile's base
        debian_root trixie "$work/trixie" ca-certificates
        import_once "$base" -C "$work/trixie" --exclude './usr/local/cuda*' .
        add_cuda "$work/trixie" "$work/cuda-packages"
        import_once "$toolkit" -C "$work/trixie" .
        arguments+=(--build-arg MAX_JOBS=1)
        if [ -n "${TORCH_CUDA_ARCH_LIST:-}" ]; then
            arguments+=(--build-arg TORCH_CUDA_ARCH_LIST="$TORCH_CUDA_ARCH_LIST")
        fi
        ;;
    *) echo "usage: $0 cpu|cuda WORK_FOLDER" >&2; exit 2 ;;
esac

mounts=(-v /etc/ssl/certs:/etc/ssl/certs:ro -v /etc/apt/apt.conf.d:/etc/apt/apt.conf.d:ro)
if [ -f /etc/pip.conf ]; then mounts+=(-v /etc/pip.conf:/etc/pip.conf:ro); fi
# Old versions of podman build the stages that are not used, too: these get a base all the same.
low podman build --isolation chroot --network host --pull=never --format docker "${mounts[@]}" \
    --build-arg DEVICE="$device" --build-arg CPU_IMAGE="$base" --build-arg CUDA_IMAGE="$toolkit" \
    --build-arg CUDA_RUNTIME="$base" "${arguments[@]}" --tag "$image" .
podman image inspect --format '{{.Size}} bytes, user {{.Config.User}}, command {{.Config.Cmd}}' "$image"

container=$(buildah from --pull-never "$image")
trap 'buildah rm "$container" >/dev/null' EXIT
# chroot isolation, which needs no cgroups; buildah takes the user of the image, and no default command.
inside() { low buildah run --isolation chroot "$@"; }
inside "$container" -- id -un
inside "$container" -- env DS_ACCELERATOR=cpu tini -s -- python -m trainer.doctor
if [ "$device" = cuda ]; then
    # Without a GPU the library still loads, and registers its kernels for CUDA.
    inside "$container" -- python -c '
import torch, model.ops.library as library
assert library.load_errors()["cpu"] is None and library._load("cuda") is None
for name in ("masked_cross_attention", "resampler_attention"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"flamingo::{name}", "CUDA"), name
print("CUDA kernels load, for", *library.cuda_architectures())'
fi
inside -v "$PWD/configs:/work/configs:ro" "$container" -- \
    python -m trainer.plan configs/flamingo-3b.yaml --nodes 1 --devices-per-node 8
inside -v "$PWD/tests/container:/tests:ro" "$container" -- bash /tests/train_inside.sh
