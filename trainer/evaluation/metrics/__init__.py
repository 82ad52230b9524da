"""Score answers: CIDEr, VQA accuracy, exact answers, top-k and ROC-AUC. No metric needs Java."""

from trainer.evaluation.metrics.captions import cider
from trainer.evaluation.metrics.ptb_tokens import ptb_tokenize
from trainer.evaluation.metrics.questions import normalize_answer, vqa_accuracy
from trainer.evaluation.metrics.rankings import exact, roc_auc, top_k

__all__ = ["cider", "exact", "normalize_answer", "ptb_tokenize", "roc_auc", "top_k", "vqa_accuracy"]
