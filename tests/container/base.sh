# Functions that make Debian roots in place of the bases of the Dockerfile and of launch_scripts/apptainer.def, for
# machines that reach Debian's and Python's package registries but no image registry. Sourced by the scripts beside it.

# Prints the Debian mirror of this machine.
debian_mirror() {
    sed -n 's/^URIs: *//p; s/^deb \(http[^ ]*\) .*/\1/p' /etc/apt/sources.list.d/*.sources /etc/apt/sources.list 2>/dev/null |
        grep -v security | head -n 1
}

# Makes a root of a Debian suite once: debian_root SUITE FOLDER PACKAGES
debian_root() {
    if [ -e "$2/finished" ]; then return; fi
    # An older debootstrap does not know the newer suites by name; all of them take the steps of sid.
    nice -n "${NICE:-10}" debootstrap --variant=minbase --include="$3" "$1" "$2" "$(debian_mirror)" \
        /usr/share/debootstrap/scripts/sid
    rm -rf "$2"/var/cache/apt/archives/*.deb
    touch "$2/finished"
}

# Puts nvcc and the headers and libraries that it needs into a root, from NVIDIA's packages for Python. They have the
# CUDA version of the Dockerfile's base, and lie where that base has them: add_cuda ROOT SCRATCH_FOLDER
add_cuda() {
    if [ -e "$1/usr/local/cuda/bin/nvcc" ]; then return; fi
    local version
    version=$(sed -n 's/^ARG CUDA_IMAGE=.*cuda:\([0-9]*\.[0-9]*\)\..*/\1/p' Dockerfile)
    rm -rf "$2"
    python3 -m pip install --quiet --no-cache-dir --target "$2" \
        "cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]==$version.*"
    mv "$2"/nvidia/cu* "$1/usr/local/cuda-$version"
    rm -rf "$2"
    ln -s "cuda-$version" "$1/usr/local/cuda"
    ln -s lib "$1/usr/local/cuda/lib64"
    ln -s libcudart.so.13 "$1/usr/local/cuda/lib/libcudart.so"
}
