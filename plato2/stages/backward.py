"""Extra stage, backward generation: the context that a response was given to, p(c|r). It is not in the paper.

It ranks candidates by maximum mutual information: a reply that fits everything says little about what
it answers (Li et al., 2016; Zhang et al., 2020, DialoGPT, section 3.2).
"""

from plato2.config import Use
from plato2.stages.coarse import CoarseGeneration


class BackwardGeneration(CoarseGeneration):
    """L_NLL = -sum_t log p(c_t | r, c_<t), the mean over all target tokens of a step.

    This is equation 1 with context and response in each other's place, which is where `BackwardBatch` puts
    them. The parameters are those of stage 1.
    """

    name = "backward"
    use = Use("backward")
    warm_starts_from = ("1_coarse", "backward")
