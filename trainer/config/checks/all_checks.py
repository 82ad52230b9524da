"""Check settings against each other and against this machine.

Nothing here imports torch, so a wrong configuration is reported within a second.
"""

from __future__ import annotations

from trainer.config.checks.contrastive_rules import (
    combine_problems,
    contrastive_problems,
    missing_contrastive_files,
)
from trainer.config.checks.data_rules import source_problems
from trainer.config.checks.deepspeed_rules import deepspeed_problems, optimizer_problems
from trainer.config.checks.evaluation_rules import evaluation_problems, live_evaluation_problems
from trainer.config.checks.forgetting_rules import forgetting_problems
from trainer.config.checks.language_model_rules import architecture_problems, language_model_file_problems
from trainer.config.checks.missing_files import missing_export, missing_files
from trainer.config.checks.missing_libraries import missing_libraries
from trainer.config.checks.step_rules import length_problems, profiler_problems, resilience_problems
from trainer.config.checks.task_rules import activation_problems, task_problems
from trainer.config.checks.trainable_rules import trainable_problems
from trainer.config.deepspeed_json import raw_problems
from trainer.config.evaluation_config import EvaluationConfig
from trainer.config.run_config import RunConfig
from trainer.config.study_config import StudyConfig, study_problems
from trainer.errors import Problem


def check_settings(config: object, *, check_files: bool = True) -> list[Problem]:
    """Return everything that is wrong across settings.

    Args:
        config: A RunConfig, an EvaluationConfig or a StudyConfig; others have no rules.
        check_files: Whether manifests, local folders and optional libraries must exist on this machine.
    """
    if isinstance(config, EvaluationConfig):
        missing = missing_export(config) if check_files else ()
        return [*evaluation_problems(config, check_files), *missing]
    if isinstance(config, StudyConfig):
        return list(study_problems(config, check_files))
    if not isinstance(config, RunConfig):
        return []
    problems = [
        *source_problems(config),
        *length_problems(config),
        *deepspeed_problems(config),
        *optimizer_problems(config),
        *resilience_problems(config),
        *activation_problems(config),
        *profiler_problems(config),
        *task_problems(config),
        *combine_problems(config),
        *contrastive_problems(config),
        *trainable_problems(config),
        *architecture_problems(config),
        *live_evaluation_problems(config, check_files=check_files),
        *forgetting_problems(config, check_files=check_files),
        *raw_problems(config, check_files=check_files),
    ]
    if check_files:
        problems += [
            *missing_files(config),
            *missing_contrastive_files(config),
            *missing_libraries(config),
            *language_model_file_problems(config),
        ]
    return problems
