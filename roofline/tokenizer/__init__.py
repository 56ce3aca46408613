"""Text to token ids and back: what a model's files say of its tokenizer, and nothing of the model.

User text never becomes special tokens here, and streamed text never shows half a character or half
a stop string.
"""

from roofline.tokenizer.chat_template import ChatTemplate
from roofline.tokenizer.folder_vocabulary import read_chat_template
from roofline.tokenizer.text_stream import TextStream
from roofline.tokenizer.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "TextStream", "Tokenizer", "read_chat_template"]
