# What quickstart.sh, easy_vqa.sh and in_context.sh share. They source this file in the root of the clone.
#
#   begin NAME             makes the environment; sets name, processes, seed, data (a folder) and runs (a folder)
#   step TITLE             prints the title and the seconds since the environment is ready
#   launch MODULE FILE     trains configs/NAME/FILE on all processes; the script ends if it is asked to stop
#   evaluate FILE          evaluates configs/NAME/FILE on all processes
#
# PROCESSES (default: 2) and SEED (default: 0) come from the environment. Seed 0 uses data/NAME and runs/NAME, another
# seed uses data/NAME-seed-SEED and runs/NAME-seed-SEED.
. launch_scripts/job.sh
started=$SECONDS

step() { printf '\n\033[1m== %s\033[0m (%d s)\n' "$1" "$((SECONDS - started))"; }

begin() {
    name=$1 processes=${PROCESSES:-2} seed=${SEED:-0}
    local suffix=
    if [ "$seed" != 0 ]; then suffix=-seed-$seed; fi
    data=data/$name$suffix runs=runs/$name$suffix
    launch_scripts/setup.sh
    export PATH="$PWD/${VENV:-.venv}/bin:$PATH"
    started=$SECONDS
    # Each process gets one thread, because the machine may have only two cores.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
    if ! nvidia-smi >/dev/null 2>&1; then export DS_ACCELERATOR=cpu; fi
}

# Prints the path of a configuration in which the folders are those of the seed.
configuration() {
    local text
    if [ "$seed" = 0 ]; then echo "configs/$name/$1"; return; fi
    text=$(<"configs/$name/$1")
    text=${text//"data/$name"/"$data"}
    mkdir -p "$runs/configs"
    printf '%s\n' "${text//"runs/$name"/"$runs"}" >"$runs/configs/$1"
    echo "$runs/configs/$1"
}

on_all_processes() {
    local port=$((20000 + RANDOM % 20000))
    run_job deepspeed --log_level warning --num_accelerators "$processes" --master_port "$port" --module "$@"
    if [ "$stop_requested" = 1 ]; then exit 75; fi
}

launch() { on_all_processes "trainer.$1" "$(configuration "$2")" --training.seed "$seed" --data.seed "$seed"; }

evaluate() { on_all_processes trainer.evaluate "$(configuration "$1")"; }
