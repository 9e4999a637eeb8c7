"""The vocabulary of the small presets; policy.py and reflector.py call this."""
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import data


def train_tokenizer() -> str:
    """A byte-level BPE tokenizer of LIBERO's own instructions, as JSON: the small presets need no download."""
    instructions = [task.instruction for task in data.parse_tasks("all+libero_90")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=["<PAD>", "<s>", "</s>", "▁"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(instructions, trainer)
    return tokenizer.to_str()
