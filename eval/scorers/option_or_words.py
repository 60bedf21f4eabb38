"""For MLLM-ACL's mathematics and GUI: visual perception's native rule, as their own judges are elsewhere.

GPT-4 judges MathVista's answers, a server MMT-Bench's; this rule imitates neither and has no compat.
"""

from delo_eval.scorers.base import Scorer
from delo_eval.scorers.mllm_acl_vp import right

SCORER = Scorer(
    "option_or_words.v1", "the option's letter, or the words of the answer stand in the prediction", right
)
