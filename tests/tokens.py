"""A tokenizer of one token a character, small enough for the tiny models."""

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def character_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """Printable ASCII and the line break, by character; with a chat template where asked."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*special, *map(chr, range(32, 127)), "\n"])}
    characters = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    characters.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    made.chat_template = TEMPLATE if chat else None
    return made
