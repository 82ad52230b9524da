"""lm_eval and ``forgetting`` find the same numbers, on local data, with a frozen language model."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import LanguageModelConfig
from model.factory import build_flamingo, build_tokenizer
from model.flamingo import Flamingo
from model.tokens import FlamingoTokenizer
from tests.data.helpers import build_manifest, write_shard
from tests.model.builders import FAMILIES, tiny_config, tiny_tokenizer, wake
from trainer.evaluation.held_out_text import read_held_out_text
from trainer.evaluation.text_scores import TextScorer
from trainer.tasks.row_builders import flamingo_encoding

lm_eval = pytest.importorskip("lm_eval", reason="the extra lm_eval is not installed")

MAX_TOKENS = 24
TEXTS = [" ".join(f"w{(7 * i + 3 * j) % 50}" for j in range(4 + 5 * i)) for i in range(4)]  # 4 to 19 words
QUESTIONS = [{"text": f"w{i} w{i + 1}", "choices": [f"w{i + 2}", f"w{2 * i} w9"], "gold": i % 2} for i in range(6)]
BITS = """
task: local_bits
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
CHOICES = """
task: local_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with two local tasks, and the same texts as a shard."""
    made = tmp_path_factory.mktemp("lm_eval")
    (made / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    (made / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (made / "bits.yaml").write_text(BITS.format(folder=made))
    (made / "choices.yaml").write_text(CHOICES.format(folder=made))
    write_shard(made / "0.tar", [(f"t{i}", {"txt": text.encode()}) for i, text in enumerate(TEXTS)])
    build_manifest(made)
    return made


@pytest.fixture(scope="module")
def flamingo(folder: Path) -> tuple[Flamingo, FlamingoTokenizer]:
    """Tiny Flamingo whose cross-attention acts, with its tokenizer."""
    tiny_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(folder / "tokenizer")
    language_model = LanguageModelConfig(architecture=FAMILIES["llama"], tokenizer=str(folder / "tokenizer"))
    tokenizer = build_tokenizer(tiny_config(language_model=language_model))
    model = build_flamingo(tiny_config(language_model=language_model), tokenizer)
    wake(model, 0.5)
    return model.eval(), tokenizer


def wrapped(flamingo: tuple[Flamingo, FlamingoTokenizer], **settings: Any) -> Any:
    from trainer.evaluation.lm_eval_model import LanguageModelForLmEval

    return LanguageModelForLmEval.of_model(*flamingo, **{"max_tokens": MAX_TOKENS, **settings})


def scorer(model: Flamingo, tokenizer: FlamingoTokenizer) -> TextScorer:
    return TextScorer(model.language_model, model.language_model.own_tokens("cpu"), tokenizer.pad_id, 3)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_both_find_the_same_bits_and_choices(flamingo: Any, folder: Path, batch_size: int) -> None:
    from trainer.evaluation.lm_eval_model import task_scores

    model, tokenizer = flamingo
    states = random.getstate(), torch.get_rng_state()
    found = task_scores(wrapped(flamingo, batch_size=batch_size), ["local_bits", "local_choices"], folder, None)
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])  # no run changes by it

    encoding = flamingo_encoding(tokenizer)
    text = read_held_out_text(folder / "manifest.npz", encoding, 100, MAX_TOKENS)
    nats = math.fsum(score.nats for score in scorer(model, tokenizer).scores(text.pieces))
    assert found["local_bits/bits_per_byte"] == pytest.approx(nats / math.log(2) / text.num_bytes, rel=1e-6)

    right = 0
    for question in QUESTIONS:
        ids = [encoding.plain_ids(f"{question['text']} {choice}") for choice in question["choices"]]
        scores = scorer(model, tokenizer).scores(
            [[encoding.bos_id, *one] for one in ids], [len(one) - 2 for one in ids]
        )
        right += scores[question["gold"]].nats == min(score.nats for score in scores)
    assert found["local_choices/acc"] == pytest.approx(right / len(QUESTIONS))
    assert 0 < right < len(QUESTIONS)


def test_lm_evals_own_model_of_transformers_agrees(flamingo: Any) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = flamingo
    own = wrapped(flamingo, max_tokens=9)  # texts are longer, so they are cut
    theirs = HFLM(
        pretrained=model.language_model.lm,
        tokenizer=tokenizer.tokenizer,
        max_length=8,
        batch_size=1,
        prefix_token_id=tokenizer.bos_id,
        device="cpu",
    )
    counts_Z = model.language_model.own_tokens("cpu")

    def without_added_tokens(_: Any, __: Any, output: Any) -> None:
        output.logits.masked_fill_(~counts_Z, -torch.inf)

    hook = model.language_model.lm.register_forward_hook(without_added_tokens)
    whole = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in TEXTS]
    assert own.loglikelihood_rolling(whole) == pytest.approx(theirs.loglikelihood_rolling(whole, True), rel=1e-5)
    parts = [Instance("loglikelihood", {}, ("", "w1 w2"), 0)]
    assert own.loglikelihood(parts, True)[0][0] == pytest.approx(theirs.loglikelihood(parts, True)[0][0], rel=1e-5)
    hook.remove()


def test_answers_are_greedy_and_end_at_stop_strings(flamingo: Any) -> None:
    from lm_eval.api.instance import Instance

    own = wrapped(flamingo)

    def answer(**settings: Any) -> str:
        return str(own.generate_until([Instance("generate_until", {}, ("w1 w2", settings), 0)])[0])

    words = answer(max_gen_toks=4).split()
    assert len(words) == 4
    (score,) = own.loglikelihood([Instance("loglikelihood", {}, ("w1 w2", " " + " ".join(words)), 0)], True)
    assert score[1]
    assert answer(max_gen_toks=4, until=[words[1]]) == answer(max_gen_toks=4).partition(words[1])[0]
    with pytest.raises(ValueError, match="only greedy"):
        answer(do_sample=True)


def test_unknown_tasks_and_long_answers_are_refused(flamingo: Any, folder: Path) -> None:
    from lm_eval.api.instance import Instance

    from trainer.evaluation.lm_eval_model import task_scores

    with pytest.raises(ValueError, match="has no task nothing"):
        task_scores(wrapped(flamingo), ["nothing"], folder, None)
    with pytest.raises(ValueError, match="max_tokens is 3"):
        wrapped(flamingo, max_tokens=3).loglikelihood([Instance("loglikelihood", {}, ("w1", " w2 w3 w4"), 0)], True)
