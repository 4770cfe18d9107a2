"""What a run measures and draws on its way."""

from collections.abc import Callable
from typing import Any

from deepen.train.config import RunConfig
from deepen.train.samples import Samples, prompts_of_documents, prompts_of_texts
from deepen.train.trainee import Trainee
from deepen.train.validation import Validation


class Watch:
    """The validation documents of a run's corpus, and the prompts that its model continues."""

    def __init__(self, config: RunConfig, trainee: Trainee, show: Callable[[str], None]) -> None:
        tokenizer: Any = trainee.tokenizer
        self.validation = Validation(
            trainee.model, tokenizer, config.data, max_length=config.max_length, max_tokens=config.eval_tokens, say=show
        )
        prompts = prompts_of_texts(config.sample_prompts, tokenizer, chat=tokenizer.chat_template is not None)
        if not prompts:
            prompts = prompts_of_documents(config.data, tokenizer, count=config.num_samples)
        self.samples: Samples | None = None
        if prompts:
            eos_ids = trainee.backbone.eos_ids or (() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,))
            self.samples = Samples(
                trainee.model, tokenizer, prompts, max_new_tokens=config.sample_tokens, eos_ids=eos_ids
            )
