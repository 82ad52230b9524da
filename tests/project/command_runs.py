"""Say for each command of the documentation which test runs it, or why none does.

``tests/project/commands.py`` checks all of them without running them. Patterns match a whole command.
"""

from __future__ import annotations

# Not run word for word: each takes tens of seconds. Their settings are loaded; tests run the programs with others.
ONLY_CHECKED = (
    r"python -m trainer\.doctor( configs/debug\.yaml)?",
    r"python -m trainer\.train configs/flamingo-3b\.yaml --help",
    r"python -m trainer\.inspect configs/debug\.yaml .*",
    r"python -m trainer\.train configs/debug\.yaml(?!.*my_tasks).*",
    r"PROCESSES=2 launch_scripts/local\.sh configs/debug\.yaml .*",
    r"FLAMINGO_OPS=reference python -m trainer\.train configs/debug\.yaml",
    r"python -m trainer\.plan configs/(?!benchmark/small).*",
    r"python -m trainer\.study configs/studies/paper-table-3\.yaml --list",
)

# Programs that another test runs with other files, sizes or numbers of processes, and a word that stands in that test.
ELSEWHERE = {
    r"launch_scripts/setup\.sh( --dev)?|source \.venv/bin/activate": ("tests/project/test_scripts.py", "setup"),
    r"launch_scripts/docs\.sh": ("tests/project/test_docs.py", "docs.sh"),
    r"launch_scripts/local\.sh configs/flamingo.*": ("tests/project/test_local_script.py", "local.sh"),
    r"launch_scripts/multinode\.sh hostfile .*": ("tests/distributed/test_multinode.py", "multinode.sh"),
    r"sbatch .* launch_scripts/slurm\.sbatch .*": ("tests/distributed/test_slurm.py", "slurm.sbatch"),
    r"python -m trainer\.preflight --hostfile .*": ("tests/distributed/test_multinode.py", "preflight"),
    r"python -m trainer\.supervise .*": ("tests/distributed/test_supervisor.py", "supervise"),
    r"python -m trainer\.checkpoint (list|verify|prune) .*": ("tests/checkpoint/test_command.py", "prune"),
    r"python -m trainer\.checkpoint convert .*": ("tests/distributed/test_checkpoint_universal.py", "convert"),
    r"python -m trainer\.benchmark step .*": ("tests/benchmarks/test_step_benchmark.py", "step"),
    r"python -m trainer\.benchmark kernels .*": ("tests/benchmarks/test_kernels_benchmark.py", "kernels"),
    r"python -m trainer\.benchmark rates .*": ("tests/benchmarks/test_rates_benchmark.py", "rates"),
    r"python -m trainer\.benchmark report .*": ("tests/benchmarks/test_report.py", "report"),
    r"python -m trainer\.plan configs/benchmark/small\.yaml .* --rates .*": (
        "tests/benchmarks/test_rates_benchmark.py",
        "--rates",
    ),
    r"python -m trainer\.evaluate .*": ("tests/evaluation/test_command.py", "evaluate"),
    r"deepspeed .* trainer\.evaluate .*": ("tests/distributed/test_evaluation.py", "evaluate"),
    r"python -m trainer\.generate .*": ("tests/project/test_generate.py", "generate"),
    r"python -m trainer\.demo .*": ("tests/demo_page/test_server.py", "demo"),
    r"python -m trainer\.index .*": ("tests/data/shards/test_index_command.py", "index"),
    r"python -m trainer\.convert (folder my-images|folder images|mmc4|obelics) ?.*": (
        "tests/data/conversion/test_convert.py",
        "obelics",
    ),
    r"python -m trainer\.(import_model|convert folder|export) tiny.*": (
        "tests/distributed/test_interop.py",
        "import_model",
    ),
    r"deepspeed --num_gpus 2 .* configs/continue/tiny\.yaml": ("tests/distributed/test_interop.py", "run_distributed"),
    r"python -m trainer\.export runs/quickstart/.*": ("tests/distributed/test_launcher.py", "huggingface"),
    r"python -m trainer\.inspect configs/(own_data|easy_vqa)/.*": ("tests/data/stream/test_inspect.py", "inspect.main"),
    r"(DS_ACCELERATOR=cpu )?python -m trainer\.(train|pretrain_lm|pretrain_vision) configs/own_data/.*": (
        "tests/golden/test_golden.py",
        "RECIPES",
    ),
    r"python -m trainer\.pretrain_vision configs/vision/debug\.yaml": ("tests/golden/test_golden.py", "RECIPES"),
    r"deepspeed .* trainer\.zero_shot .*": ("tests/tasks/test_zero_shot.py", "test_the_command_tests_an_export"),
    r"python -m trainer\.train configs/debug\.yaml .*my_tasks": ("tests/distributed/test_forgetting.py", "task_folder"),
    r"python docs/draw_runs\.py": ("tests/project/test_draw_runs.py", "draw_runs.py"),
    r"python -m tests\.golden\.renew.*": ("tests/golden/test_golden.py", "RECIPES"),
    r"python -m tests\.verification\.renew.*": ("tests/verification/test_cards.py", "renew"),
    r"launch_scripts/(quickstart|easy_vqa|in_context)\.sh": (
        "tests/project/test_demonstrations.py",
        "RUN_DEMONSTRATIONS",
    ),
}

# No test runs these, apart from what tests/project/commands.py checks.
NOT_RUN = {
    r"python -m trainer\.train configs/flamingo-3b\.yaml --data.*": "needs public weights, data and GPUs",
    r"python -m trainer\.inspect configs/flamingo-3b\.yaml .*": "needs the shards and the tokenizer of a 3B",
    r"deepspeed --num_accelerators 4 --module trainer\.train configs/flamingo-3b\.yaml .*": "needs four GPUs",
    r"deepspeed .* trainer\.pretrain_vision configs/vision/vit-l-14\.yaml .*": "needs GPUs and public data",
    r"python -m trainer\.study configs/studies/paper-table-3\.yaml": "takes an hour",
    r"launch_scripts/combine_vision\.sh": "takes an hour",
    r"launch_scripts/test\.sh|pytest.*|pre-commit install|ruff .*|mypy|lint-imports": "the tests and checks themselves",
    r"docker .*": "needs a registry of images; tests/container/build_image.sh builds the images with podman",
    r"apptainer .*|srun .*": "needs a cluster; tests/container/build_apptainer.sh builds the image on another base",
}

# Blocks of Python, YAML and JSON, by page and language, with the test that runs or loads them. ``PAGES`` of
# tests/project/test_docs.py names further pages.
BLOCKS = {
    ("README.md", "yaml"): "tests/project/test_readme.py",
    ("docs/architecture.md", "python"): "tests/project/test_architecture.py",
    ("docs/easy_vqa.md", "yaml"): "tests/project/test_command_runs.py",
    ("docs/evaluation.md", "json"): "tests/project/test_evaluation_page.py",
    ("docs/evaluation.md", "yaml"): "tests/project/test_evaluation_page.py",
    ("docs/fine_tuning.md", "yaml"): "tests/project/test_command_runs.py",
    ("docs/interop.md", "python"): "tests/distributed/test_interop.py",
    ("docs/own_data.md", "python"): "tests/project/test_own_data.py",
    ("docs/vision_stage.md", "python"): "tests/project/test_vision_page.py",
    ("docs/vision_stage.md", "yaml"): "tests/project/test_vision_page.py",
}
