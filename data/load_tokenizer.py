"""The tokenizer of policy.py and reflector.py, which call this."""
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast


def load_tokenizer(text: str):
    """From the text of a `tokenizer.json`, ours or OpenVLA's: the names of their special tokens are the same."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), pad_token="<PAD>", bos_token="<s>", eos_token="</s>",
                                   padding_side="left")
