"""Supervised fine-tuning: the pretraining job with parameters to start from."""

from __future__ import annotations

import dataclasses

from t5style.train.pretrain import Pretrain


@dataclasses.dataclass(frozen=True)
class Finetune(Pretrain):
    """Trains on, from `init_from`: a run folder, a checkpoint of one, or a Hugging Face directory.

    Everything else is as in Pretrain; the optimiser and the schedule start anew. Typically `task` has the
    Supervised objective, and the learning rate is a tenth to a third of pretraining's.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.init_from:
            raise ValueError(
                "init_from is not set: Finetune needs a model to start from (from scratch: Pretrain)"
            )
